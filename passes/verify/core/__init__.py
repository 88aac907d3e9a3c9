"""Values as verify knows them: where they lie on ranks, and which messages the ranks exchange."""
