"""Loops of a model: over a range, unrolled; over a length, outlined into a function of their own."""
