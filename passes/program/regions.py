"""regions: cuts a rank's graph at its messages into graphs that run without anybody else, to be captured each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.fx
from torch.fx import Node
from torch.fx.node import map_arg

Values = dict[Node, Any]


@dataclass(frozen=True, slots=True)
class Region:
    """A run of nodes between two messages, as a module: it is called with the values of `inputs`, and returns those of
    `outputs`, as a tuple."""

    module: torch.fx.GraphModule
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]


def regions(module: torch.fx.GraphModule, is_message: Callable[[Node], bool]) -> tuple[Region | Node, ...]:
    """Returns the parts of a graph in the order in which they run: regions, and the messages between them as they are.

    `inputs` and `outputs` of a region are nodes of `module`: its inputs, messages, and what other regions return.
    Weights are the module's own.
    """
    parts: list[list[Node] | Node] = [[]]
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if is_message(node):
            parts += [node, []]
        else:
            last = parts[-1]
            assert isinstance(last, list)
            last.append(node)
    return tuple(part if isinstance(part, Node) else _region(module, part) for part in parts if part)


def arguments(node: Node, values: Mapping[Node, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a message, where the nodes' values are known."""
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    return tuple(args), dict(kwargs)


def _region(module: torch.fx.GraphModule, nodes: list[Node]) -> Region:
    graph, copies, inputs = torch.fx.Graph(), dict[Node, Node](), []

    def copied(n: Node) -> Node:
        if n not in copies:
            if n.op == "get_attr":
                copies[n] = graph.node_copy(n)
            else:
                copies[n] = graph.placeholder(n.name)
                inputs.append(n)
        return copies[n]

    own = set(nodes)
    for node in nodes:  # placeholders stand before all else
        for n in node.all_input_nodes:
            if n.op != "get_attr" and n not in own:
                copied(n)
    for node in nodes:
        copies[node] = graph.node_copy(node, copied)
    outputs = tuple(node for node in nodes if any(user not in own for user in node.users))
    graph.output(tuple(copies[node] for node in outputs))
    return Region(torch.fx.GraphModule(module, graph), tuple(inputs), outputs)
