"""A plan as values, and as JSON."""
