"""Translates a normalised fx graph into the cost model's op graph."""
