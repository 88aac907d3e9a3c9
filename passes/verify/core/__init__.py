"""What verify knows of values: as they lie on ranks, and what was found out."""
