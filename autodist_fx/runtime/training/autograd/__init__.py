"""Backward passes that autograd has no call for: in two parts, and over layers that are computed again."""
