"""Explains plans in words, for terminals, notebooks and comparisons."""
