"""normalize: one spelling for everything that the later passes read, and nothing left in the graph that is constant.

    before  size = x.size(); getitem = size[0]; view = q.view((getitem, getitem_1, -1, 64))
    after   batch = getitem(input_ids.shape, 0); reshape = torch.reshape(q, (batch, seq, 8, 64))

Done in this order, since each step leaves work for the next: constants and lengths are recognised by running the graph
at two sizes; views get their full shapes; heads folded into the batch get a dim of their own; ops that change nothing
go; repeated KV heads become one op; equal computations become one; what nothing uses goes.
"""

from __future__ import annotations

import torch
import torch.fx

from cost_model.errors import PlanError
from passes.fx import node_meta
from passes.fx.nodes import is_pure
from passes.fx.shape_propagation import Example, annotate
from passes.normalize.canonicalize_calls import spell_out_calls
from passes.normalize.decompose_modules import spell_out_modules
from passes.normalize.eliminate_common_subexpressions import merge_equal
from passes.normalize.extract_guards import take_conditions
from passes.normalize.fold_lengths import fold_lengths
from passes.normalize.functionalize import functionalize
from passes.normalize.match_repeat_kv import repeat_heads
from passes.normalize.remove_no_ops import drop_no_ops
from passes.normalize.static_view_sizes import spell_out_views
from passes.normalize.unmerge_batch import unmerge_batch
from passes.normalize.unpack_tuples import spell_out_tuples
from passes.ops.data_dependent import selected, split_rows


def normalize(graph_module: torch.fx.GraphModule, examples: tuple[Example, Example]) -> torch.fx.GraphModule:
    """Rewrite `graph_module` in place and return it. Afterwards every node has `meta["val"]` and `meta["symbols"]`.

    `examples` are two sets of meta inputs of different sizes; what is equal in both is constant. Conditions on lengths
    that were decided while tracing are in `node_meta.guards(graph_module)` (passes/normalize/extract_guards.py), None
    without any.
    """
    functionalize(graph_module)
    # what only an assertion read may be a number that no example has
    _drop_unused(graph_module.graph)
    spell_out_modules(graph_module)
    second = annotate(graph_module, examples)
    graph = graph_module.graph
    spell_out_calls(graph)
    spell_out_tuples(graph, second)
    fold_lengths(graph, second)
    _drop_unused(graph)
    _drop_unused_cache_arguments(graph)
    spell_out_views(graph, second)
    unmerge_batch(graph)
    for step in (drop_no_ops, repeat_heads, merge_equal):
        step(graph)
        _drop_unused(graph)
    _refuse_choices_among_constants(graph)
    node_meta.set_guards(graph_module, take_conditions(graph_module))
    _drop_unused(graph)
    graph.lint()
    graph_module.recompile()
    return graph_module


def _drop_unused(graph: torch.fx.Graph) -> None:
    """As eliminate_dead_code, which lints each time, and asks of what is used, too, whether it is pure."""
    for node in reversed(graph.nodes):
        if not node.users and is_pure(node):
            graph.erase_node(node)


def _refuse_choices_among_constants(graph: torch.fx.Graph) -> None:
    """How much is selected of what is equally long for all inputs looks constant at two sizes, and is not."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (selected, split_rows) and not any(
            node_meta.symbols(node.args[0])
        ):
            raise PlanError(
                f"{node.name} ({node_meta.where(node)}) selects elements of {node.args[0].name} by value, whose size "
                f"does not follow the inputs: how many these are cannot be told from a constant. Use torch.where with "
                f"three arguments there"
            )


def _drop_unused_cache_arguments(graph: torch.fx.Graph) -> None:
    """Rotary tables are handed to Cache.update for cache kinds that left transformers; only positions are read."""
    for node in graph.nodes:
        if node.op == "call_method" and node.target == "update" and len(node.args) > 4:
            extra = node.args[4]
            if isinstance(extra, dict):
                kept = {k: v for k, v in extra.items() if k == "cache_position"}
                node.args = (*node.args[:4], kept)
