"""The plan as values and as JSON, its weights, and warnings about it."""
