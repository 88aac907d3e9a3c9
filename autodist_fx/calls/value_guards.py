"""Guards on values: what Python asks of the numbers in a call, answered as the call has them, and asked again at each.

    if (audio_tokens[:, :-1] & audio_tokens[:, 1:]).sum() == 0:      are sounds spelled out token by token?
    features.split(real_images.sum(1).tolist())                      how many images has each sequence?
    hidden[image_tokens] + features                                  how many tokens are images?

A graph holds the answer for the call that it is made for. What the answer is computed of (tokens, masks, images, sizes,
but no parameter) is kept beside the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from passes.fx import node_meta

_CPU = torch.device("cpu")
_MOST_TEXT = 32768  # characters of a list of numbers that Python asks for at once


@dataclass(frozen=True, slots=True)
class ValueGuard:
    """A value that follows from a call's inputs, and what it is in a graph: a number, a truth, or a list of them."""

    value: GraphModule  # of the inputs `names`: a tensor
    names: tuple[str, ...]
    outcome: Any
    line: str  # of the model's source, "modeling_x.py:41"

    def holds(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether it comes out alike for these inputs of a call."""
        return all(name in inputs for name in self.names) and self.computed(inputs) == self.outcome

    def computed(self, inputs: Mapping[str, Any]) -> Any:
        """Return the value for these inputs, as Python has it."""
        with torch.no_grad():  # not by __call__, which fx sees while it traces
            return self.value.forward(**{name: inputs[name].to(_CPU) for name in self.names}).tolist()


def hold(guards: Sequence[ValueGuard], inputs: Mapping[str, Any]) -> bool:
    """Return whether all of these guards come out for a call's inputs as in the graph."""
    return all(guard.holds(inputs) for guard in guards)


def known_value(proxy: Any) -> Any:
    """Return what a traced tensor holds in the call that a graph is made for, as `tolist` has it; None where that
    depends on more than the call's inputs, or the graph is made for no call. Notes a guard on it."""
    inputs = proxy.tracer.values
    computed = _computed_of(proxy, inputs) if inputs else None
    if computed is None:
        return None
    guard = ValueGuard(computed, tuple(n.target for n in computed.graph.nodes if n.op == "placeholder"), None, "")
    try:
        outcome = guard.computed(inputs)
    except Exception:  # no tensor, or a kernel that these values do not go into: the model itself would say so
        return None
    if isinstance(outcome, list) and len(str(outcome)) > _MOST_TEXT:
        return None
    proxy.tracer.value_guards.append(ValueGuard(computed, guard.names, outcome, node_meta.where(proxy.node)))
    return outcome


def assumed(proxy: Any, usual: bool) -> bool:
    """Return what a traced truth is in the call that a graph is made for; `usual` in a graph that is made for no call,
    and notes a guard on it. Also `usual` where it depends on more than a call's inputs."""
    if proxy.tracer.values:
        known = known_value(proxy)
        return usual if known is None else bool(known)
    inputs = {str(node.target) for node in proxy.tracer.graph.nodes if node.op == "placeholder"}
    computed = _computed_of(proxy, inputs)
    if computed is not None:
        names = tuple(n.target for n in computed.graph.nodes if n.op == "placeholder")
        proxy.tracer.value_guards.append(ValueGuard(computed, names, usual, node_meta.where(proxy.node)))
    return usual


def _computed_of(proxy: Any, inputs: Collection[str]) -> GraphModule | None:
    """Return a graph that computes a traced tensor of these inputs alone; None where it depends on more."""
    graph, found = Graph(), dict[Node, Any]()  # node -> its copy, or the number that it is for all inputs
    for node in _needed(proxy.node):
        if node.op == "placeholder":
            if str(node.target) in inputs:
                found[node] = graph.placeholder(str(node.target))
        elif (number := _number_for_all(node, proxy.tracer)) is not None:
            found[node] = number
        elif node.target is getattr and node.args[1] == "device":
            found[node] = _CPU
        elif (source := _of_one_column(node)) in found:
            found[node] = graph.call_function(operator.getitem, (found[source], node.args[1]))
        elif node.op in ("call_function", "call_method") and all(each in found for each in node.all_input_nodes):
            copy = found[node] = graph.node_copy(node, found.__getitem__)
            copy.args, copy.kwargs = map_aggregate((copy.args, copy.kwargs), _off_meta)
    if not isinstance(found.get(proxy.node), Node):
        return None
    graph.output(found[proxy.node])
    for node in reversed(graph.nodes):  # what only sizes were computed of that are numbers here
        if not node.users and node.op not in ("output", "placeholder"):
            graph.erase_node(node)
    return GraphModule(torch.nn.Module(), graph)


def _off_meta(value: Any) -> Any:
    return _CPU if isinstance(value, torch.device) and value.type == "meta" else value


def _number_for_all(node: Node, tracer: Any) -> int | None:
    """Return the number that a node is for all inputs, a size of features, say; None for any other node."""
    known = tracer.examples_of.get(node)
    if type(known) is not int:
        return None
    try:
        return known if tracer.other_example.value(node) == known else None
    except Exception:  # whatever an op raises for the other example
        return None


def _of_one_column(node: Node) -> Node | None:
    """Return x of x.expand_as(embeddings)[..., 0]: all columns are alike. None for any other node."""
    if node.target is not operator.getitem or node.args[1] != (Ellipsis, 0) or not isinstance(node.args[0], Node):
        return None
    expanded = node.args[0]
    while expanded.target == "to":
        expanded = expanded.args[0]
    return expanded.args[0] if expanded.target == "expand_as" else None


def _needed(node: Node) -> list[Node]:
    """Return a node and all that it is computed of, in the graph's order."""
    found, pending = set[Node](), [node]
    while pending:
        one = pending.pop()
        if one not in found:
            found.add(one)
            pending += one.all_input_nodes
    return [one for one in node.graph.nodes if one in found]
