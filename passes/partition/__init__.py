"""Passes that rewrite the whole graph into one rank's."""
