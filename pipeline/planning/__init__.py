"""The search for the fastest layout, and its reasons in words."""
