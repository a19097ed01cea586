"""Which rank owns which block, by name, by hand, or balanced to costs."""
