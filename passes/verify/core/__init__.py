"""What verify knows of values: where they lie on ranks, and which messages the ranks exchange."""
