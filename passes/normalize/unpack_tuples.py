"""unpack_tuples: passes each tensor of a tuple to the op that takes it as an argument of its own.

before  chunk = x.chunk(2); cat = torch.cat(chunk)
after   chunk = x.chunk(2); cat = torch.cat((chunk[0], chunk[1]))
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx
from torch.fx import Node
from torch.fx.node import map_arg

from passes.fx import node_meta
from passes.fx.nodes import op_name
from passes.fx.run_passes import GraphEdit, PassResult
from passes.fx.shape_propagation import NormalizeContext


def unpack_tuples(graph_module: torch.fx.GraphModule, ctx: NormalizeContext) -> PassResult:
    """Rewrites `graph_module` in place, and notes the new nodes' values in `ctx.second`."""
    graph, second, edit, matches = graph_module.graph, ctx.second, GraphEdit(graph_module), 0
    for node in list(graph.nodes):
        value = node_meta.val(node)
        if type(value) not in (tuple, list) or not value or not all(isinstance(v, torch.Tensor) for v in value):
            continue
        for part in [u for u in node.users if op_name(u) == "getitem" and isinstance(u.args[1], slice)]:
            _unpack_slice(graph, node, part, second)
            matches += 1
        takers = [u for u in node.users if u.op.startswith("call") and op_name(u) != "getitem"]
        if not takers:
            continue
        matches += 1
        elements: list[Node] = []
        with graph.inserting_after(node):
            for i in reversed(range(len(value))):
                element = graph.call_function(operator.getitem, (node, i))
                _describe(element, node, node, i)
                second[element] = second[node][i]
                elements.insert(0, element)
        for user in takers:
            _read_elements(user, node, elements)
    return edit.result(matches)


def _read_elements(user: Node, whole: Node, elements: list[Node]) -> None:
    """Makes `user` read a tuple of `elements` where it reads `whole`."""
    user.args = map_arg(user.args, lambda n: tuple(elements) if n is whole else n)
    user.kwargs = map_arg(user.kwargs, lambda n: tuple(elements) if n is whole else n)


def _describe(element: Node, whole: Node, like: Node, number: int) -> None:
    """Sets what is known of `element`, tensor `number` of the tuple that `whole` gives; all but value and symbols as
    of `like`."""
    node_meta.copy(like, element)
    node_meta.set_val(element, node_meta.val(whole)[number])
    symbols = node_meta.element_symbols(whole)[number]
    assert symbols is not None
    node_meta.set_symbols(element, symbols)


def _unpack_slice(graph: torch.fx.Graph, node: Node, part: Node, second: dict[Node, Any]) -> None:
    """Rewrites chunk(x)[1:][0] as chunk(x)[1]."""
    numbers = range(len(node_meta.val(node)))[part.args[1]]
    elements = []
    with graph.inserting_before(part):
        for i in numbers:
            element = graph.call_function(operator.getitem, (node, i))
            _describe(element, node, part, i)
            second[element] = second[node][i]
            elements.append(element)
    for user in list(part.users):
        if op_name(user) == "getitem" and isinstance(user.args[1], int):
            user.replace_all_uses_with(elements[user.args[1]])
        else:
            _read_elements(user, part, elements)
