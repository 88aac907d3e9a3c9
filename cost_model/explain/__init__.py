"""A plan in words: for terminals, notebooks and comparisons."""
