"""regions: cuts a rank's graph at its messages into graphs that run without anybody else, to be captured each.

What deals rows out by values (an expert gets those that a router sent to it) is in regions of its own: the host has to
wait for the numbers of rows, and sizes are other ones at each step. These run as they are, launched op by op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.fx
from torch.fx import Node
from torch.fx.node import map_arg

from passes.fx import node_meta
from passes.ops.data_dependent import bincount, expectation, selected, split_rows
from passes.ops.experts import experts

Values = dict[Node, Any]
# The host waits for what these find out: how many rows there are of each kind.
WAITING = frozenset({selected, split_rows, bincount, experts})


@dataclass(frozen=True, slots=True)
class Region:
    """A run of nodes between two messages, as a module: it is called with the values of `inputs`, and returns those of
    `outputs`, as a tuple. `waits`: for numbers that the device computes, which sizes follow."""

    module: torch.fx.GraphModule
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    waits: bool = False


def regions(module: torch.fx.GraphModule, is_message: Callable[[Node], bool]) -> tuple[Region | Node, ...]:
    """Returns the parts of a graph in the order in which they run: regions, and the messages between them as they are.

    `inputs` and `outputs` of a region are nodes of `module`: its inputs, messages, and what other regions return.
    Weights are the module's own.
    """
    waiting = _waiting(module.graph)
    parts: list[list[Node] | Node] = [[]]
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        last = parts[-1]
        if is_message(node):
            parts += [node, []]
        elif isinstance(last, list) and (not last or (last[-1] in waiting) == (node in waiting)):
            last.append(node)
        else:
            parts.append([node])
    return tuple(
        part if isinstance(part, Node) else _region(module, part, waits=part[0] in waiting) for part in parts if part
    )


def _waiting(graph: torch.fx.Graph) -> frozenset[Node]:
    """Returns the nodes that wait for the device, or take what follows from that: anything but a tensor whose size is
    the same in each step."""
    found: set[Node] = set()
    for node in graph.nodes:
        follows = any(source in found and not _is_fixed(source) for source in node.all_input_nodes)
        if node.op != "output" and (node.target in WAITING or follows):
            found.add(node)
    return frozenset(found)


def _is_fixed(node: Node) -> bool:
    """Returns whether a node is a tensor, none of whose sizes is a made-up one."""
    return node_meta.is_tensor(node) and not any(map(expectation, node_meta.tensor(node).shape))


def arguments(node: Node, values: Mapping[Node, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a message, where the nodes' values are known."""
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    return tuple(args), dict(kwargs)


def _region(module: torch.fx.GraphModule, nodes: list[Node], *, waits: bool) -> Region:
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
    return Region(torch.fx.GraphModule(module, graph), tuple(inputs), outputs, waits)
