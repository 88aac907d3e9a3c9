"""Turns a process into a rank: from a checkpoint, an artifact or the cache of splits."""
