"""Checks of single nodes, one file for each kind that verify reads."""
