"""Proves, before anything runs, that the ranks' programs together compute what the model computes."""
