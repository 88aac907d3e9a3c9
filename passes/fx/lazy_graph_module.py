"""A GraphModule whose Python is written when it is first run: each pass rewrites the graph, and none reads the code."""

from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule

__all__ = ["LazyGraphModule"]
