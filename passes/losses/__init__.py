"""Losses of a model that is trained on parts of a batch."""
