"""A plan to look at: tables for a terminal, one HTML page, Graphviz. Imports neither torch nor transformers."""
