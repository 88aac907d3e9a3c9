"""functionalize: turns writes into tensors into new tensors, so that a graph's edges say all there is to say.

    before  %mask = full(...);  %mask[:, :, :, :n] = %padded;  use(%mask)
    after   %mask = full(...);  %set = with_item(%mask, (:, :, :, :n), %padded);  use(%set)

A mask that a later stage computes again would otherwise miss what was written into it. Reads that come before the
write keep the old value, as they do in the model. A write into a part (x[0].add_(1)) changes the whole; one through
another view (x.transpose(0, 1)[0] = 1) reaches the view alone.
"""

from __future__ import annotations

import operator

import torch
import torch.fx
from torch.fx import Node

from passes.fx import node_meta
from passes.fx.random_ops import RANDOM_FILLS
from passes.fx.run_passes import GraphEdit, PassContext, PassResult
from passes.ops.functional_writes import changed_by, copied, with_item

_IN_PLACE_OPERATORS = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, operator.iand: operator.and_, operator.ior: operator.or_,
}  # fmt: skip

_IN_PLACE_ONLY = ("fill_diagonal_",)  # methods that have no twin which gives the result


def functionalize(graph_module: torch.fx.GraphModule, ctx: PassContext | None = None) -> PassResult:
    """Rewrites `graph_module` in place. It needs no context: front ends call it, too."""
    graph, edit, matches = graph_module.graph, GraphEdit(graph_module), 0
    became: dict[Node, Node] = {}  # what has been written into -> what is read instead from there on
    for node in list(graph.nodes):
        for read in node.all_input_nodes:
            if read in became:
                node.replace_input_with(read, _latest(became, read))
        written = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        if written is None or not _make_functional(node):
            continue
        matches += 1
        node_meta.set_traced_as_tensor(node, True)
        changed = node
        while written is not None:
            became.setdefault(written, changed)
            written, changed = _write_through(graph, written, changed)
    return edit.result(matches)


def _latest(became: dict[Node, Node], node: Node) -> Node:
    """Returns the end of a chain of writes; each node that it leads through then points there."""
    chain = []
    while node in became:
        chain.append(node)
        node = became[node]
    became.update(dict.fromkeys(chain, node))
    return node


def _write_through(graph: torch.fx.Graph, written: Node, changed: Node) -> tuple[Node | None, Node]:
    """Returns (what `written` is a part of, that with the part changed); None where it is a tensor of its own.

    A part is what indexing with numbers and slices gives; indexing with a tensor copies, and an item of a tuple is no
    part. The tracer says which values are tensors (node_meta.traced_as_tensor).
    """
    if written.op != "call_function" or written.target is not operator.getitem:
        return None, changed
    whole, index = written.args
    items = index if isinstance(index, tuple) else (index,)
    copies = any(isinstance(i, list) or (isinstance(i, Node) and node_meta.traced_as_tensor(i, True)) for i in items)
    if copies or not node_meta.traced_as_tensor(whole, False):
        return None, changed
    with graph.inserting_after(changed):
        new = graph.call_function(with_item, (whole, index, changed))
    node_meta.copy(whole, new, only=("nn_module_stack", "source", "is_tensor"))
    return whole, new


def _make_functional(node: Node) -> bool:
    """Turns a node that writes into its first argument into one that returns the result; returns False if it is
    none."""
    if node.op == "call_function" and node.target is operator.setitem:
        node.target = with_item
    elif node.op == "call_function" and node.target in _IN_PLACE_OPERATORS:
        node.target = _IN_PLACE_OPERATORS[node.target]
    elif node.op == "call_method" and node.target == "copy_":
        node.op, node.target, node.args, node.kwargs = "call_function", copied, node.args[:2], {}
    elif node.op == "call_method" and node.target == "zero_":
        node.op, node.target = "call_function", torch.zeros_like
    elif node.op == "call_method" and _is_in_place_method(str(node.target)):
        node.target = str(node.target)[:-1]
    elif node.op == "call_method" and node.target in RANDOM_FILLS:
        pass  # gives back what it has filled, and none of these has a twin: seed_random_ops makes ours of it
    elif node.op == "call_method" and node.target in _IN_PLACE_ONLY:
        node.op, node.target, node.args = "call_function", changed_by, (node.args[0], node.target, *node.args[1:])
    else:
        return False
    return True


def _is_in_place_method(name: str) -> bool:
    functional = getattr(torch.Tensor, name[:-1], None) if name.endswith("_") and not name.endswith("__") else None
    return functional is not None and name[:-1] not in ("requires_grad", "data", "grad")
