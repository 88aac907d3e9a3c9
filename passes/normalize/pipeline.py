"""normalize: runs the passes that leave one spelling for everything that later passes read, and nothing constant to
compute.

    before  size = x.size(); getitem = size[0]; view = q.view((getitem, getitem_1, -1, 64))
    after   batch = getitem(input_ids.shape, 0); reshape = torch.reshape(q, (batch, seq, 8, 64))

Each pass leaves work for the next: constants and lengths are recognised by running the graph at two sizes; views get
their full shapes; heads folded into the batch get a dim of their own; ops that change nothing go; repeated KV heads
become one op; equal computations become one; what nothing uses goes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx

from cost_model.errors import PlanError
from passes.fx import node_meta
from passes.fx.check_lengths import check_lengths
from passes.fx.node_meta import Phase
from passes.fx.run_passes import Pass, run_passes
from passes.fx.shape_propagation import Example, NormalizeContext, shape_propagation
from passes.normalize.canonicalize_calls import canonicalize_calls
from passes.normalize.decompose_modules import decompose_modules
from passes.normalize.eliminate_common_subexpressions import eliminate_common_subexpressions
from passes.normalize.eliminate_dead_code import eliminate_dead_code
from passes.normalize.extract_guards import extract_guards
from passes.normalize.fold_lengths import fold_lengths
from passes.normalize.match_repeat_kv import match_repeat_kv
from passes.normalize.place_factories import place_factories
from passes.normalize.random.decompose_attention import decompose_attention
from passes.normalize.random.seed_random_ops import seed_random_ops
from passes.normalize.remove_no_ops import remove_no_ops
from passes.normalize.static_view_sizes import static_view_sizes
from passes.normalize.unmerge_batch import unmerge_batch
from passes.normalize.unpack_tuples import unpack_tuples
from passes.normalize.writes.concatenate_writes import concatenate_writes
from passes.normalize.writes.functionalize import functionalize
from passes.ops.data_dependent import selected, split_rows

PASSES: tuple[Pass[NormalizeContext], ...] = (
    functionalize,  # first: all others take a graph's edges for all there is to say
    eliminate_dead_code,  # what only an assertion read may be a number that no example has
    decompose_modules,  # before shapes are known: the weights that become arguments get theirs, too
    shape_propagation,  # all passes after it read `val` and `symbols`
    decompose_attention,  # at once: what it makes is one more piece of the model to all passes after it
    canonicalize_calls,  # so that the passes after it look for one form of each call
    unpack_tuples,  # before lengths: elements of a tuple have lengths of their own
    fold_lengths,  # before views: these are written in literals and in the nodes that it leaves
    place_factories,  # when all devices that are asked for are one node
    concatenate_writes,  # when the bounds of what is written are numbers
    eliminate_dead_code,  # most of the arithmetic on sizes, and the tensors that were written into
    static_view_sizes,  # from here on a view says its whole shape
    check_lengths,  # when all sizes are literals and nodes, and no node has become another tensor yet
    unmerge_batch,  # reads those shapes, and leaves reshapes that change nothing
    remove_no_ops,  # before patterns are looked for, which no-ops would lie in the middle of
    eliminate_dead_code,
    match_repeat_kv,  # views that repeat heads, now that each says its shape and nothing lies between them
    eliminate_dead_code,  # the views that it leaves unread
    seed_random_ops,  # when only random ops are left that draw, and heads have a dim of their own
    eliminate_common_subexpressions,  # last of the rewrites: what they made equal is found equal
    eliminate_dead_code,
    extract_guards,  # reads lengths from the few nodes at the top that fold_lengths left
    eliminate_dead_code,  # what only guards read
)


def normalize(
    graph_module: torch.fx.GraphModule, examples: tuple[Example, Example], others: Sequence[Example] = ()
) -> torch.fx.GraphModule:
    """Rewrites `graph_module` in place and returns it. Afterwards every value has its `val` and every tensor `symbols`.

    `examples` are two sets of meta inputs of different sizes; what is equal in both is constant. Guards on lengths that
    were decided while tracing are `node_meta.guards(graph_module)`, None without any; what each pass did is
    `node_meta.history(graph_module)`. `others`: further sizes, at which its values are to have the sizes that they had
    before, where its guards hold there. Raises PlanError for a selection whose size looks constant and is not,
    AmbiguousLengthsError where `examples` do not tell two sizes apart that differ in `others`.
    """
    ctx = NormalizeContext.of(examples, others)
    node_meta.check(graph_module, ctx.phase)
    run_passes(PASSES, graph_module, ctx)
    _refuse_choices_among_constants(graph_module.graph)
    node_meta.set_history(graph_module, ctx.history)
    node_meta.check(graph_module, Phase.NORMALIZED)
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def _refuse_choices_among_constants(graph: torch.fx.Graph) -> None:
    """Raises PlanError for a selection among elements of constant number: it looks constant at two sizes, and is
    not."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (selected, split_rows) and not any(
            node_meta.symbols(node.args[0])
        ):
            raise PlanError(
                f"{node.name} ({node_meta.where(node)}) selects elements of {node.args[0].name} by value, whose size "
                f"does not follow the inputs: how many these are cannot be told from a constant. Use torch.where with "
                f"three arguments there"
            )
