"""Translation of whole files: parts of the input that are dealt to workers and kept."""
