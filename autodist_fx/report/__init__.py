"""Views of a plan: tables for a terminal, one HTML page, Graphviz. They import neither torch nor transformers."""
