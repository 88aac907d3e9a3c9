"""Decides which elements of each dim a tp rank holds, and which experts it holds whole."""
