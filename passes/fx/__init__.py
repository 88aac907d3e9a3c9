"""Helpers over torch.fx graphs that every pass may use."""
