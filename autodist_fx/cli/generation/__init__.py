"""Prompts and answers of `run` and `demo`, and the time since which they run."""
