"""One file for each kind of node that verify reads."""
