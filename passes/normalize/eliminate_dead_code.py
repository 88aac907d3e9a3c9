"""eliminate_dead_code: removes nodes that nothing reads and that have no effect of their own.

    before  %size = %x.size(); %length = sym_size(%x, 0); use(%length)
    after   %length = sym_size(%x, 0); use(%length)

torch.fx's own lints each time, and takes what writes into a cache for pure.
"""

from __future__ import annotations

import torch.fx

from passes.fx.nodes import is_pure
from passes.fx.run_passes import PassContext, PassResult


def eliminate_dead_code(graph_module: torch.fx.GraphModule, ctx: PassContext) -> PassResult:
    """Rewrites `graph_module` in place."""
    removed = 0
    for node in reversed(graph_module.graph.nodes):
        if not node.users and is_pure(node):
            graph_module.graph.erase_node(node)
            removed += 1
    return PassResult(graph_module, matches=removed, removed=removed)
