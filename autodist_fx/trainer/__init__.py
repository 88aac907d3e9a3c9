"""transformers' Trainer over an engine."""
