"""Saves a model in training, and goes on with it on any mesh."""
