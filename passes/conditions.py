"""conditions: `if`s on lengths that the model's Python took while it was traced, kept to be asked again at every call.

    before  %gt = %seq > 24                      (meta["condition"] = False: so it was for the traced lengths)
    after   nothing in the graph; Conditions.check(inputs) computes `seq > 24` for the lengths at hand

A graph has one way through, whatever the lengths. Where a call's lengths would have taken the model another way, both
ways may compute the same (one being a shortcut) or may not: nobody can tell from here, so the caller is warned. But not
of comparisons with 1: that a single token needs no causal mask is the shortcut which nearly every model takes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch.fx import Node
from torch.fx.node import map_arg

MARK = "condition"  # node.meta key: what the condition was while tracing
_PAST = "past_length"


def is_condition(node: Node) -> bool:
    return MARK in node.meta


@dataclass(frozen=True)
class Conditions:
    """Of the lengths of a traced graph's inputs; `asked` gives one value a condition, in order."""

    asked: torch.fx.GraphModule
    inputs: tuple[str, ...]  # the arguments of `asked`
    expected: tuple[bool, ...]
    sources: tuple[str, ...]  # the model's lines

    def check(self, inputs: Mapping[str, Any], past: int = 0) -> None:
        """`past`: tokens in the cache. Warns, with the model's line, of what is otherwise than it was."""
        given = {_PAST: past, **inputs}
        if any(given.get(name) is None for name in self.inputs):
            return
        answers = self.asked(*(given[name] for name in self.inputs))
        for answer, expected, source in zip(answers, self.expected, self.sources, strict=True):
            if bool(answer) != expected:
                lengths = ", ".join(f"{n} {list(v.shape)}" for n, v in inputs.items() if isinstance(v, torch.Tensor))
                warnings.warn(
                    f"for these lengths ({lengths}; {past} tokens cached) the model's code goes another way at "
                    f"{source} than for those it was traced with, where the condition was {expected}: compare with the "
                    "model, or use lengths for which it is the same",
                    stacklevel=3,
                )


def take_conditions(module: torch.fx.GraphModule) -> Conditions | None:
    """Takes the marked nodes out of a normalised graph. None where all came out as constants.

    A condition on something else than lengths of the inputs stays as it was decided.
    """
    marked = [node for node in module.graph.nodes if is_condition(node)]
    graph, copies = torch.fx.Graph(), dict[Node, Node]()
    found: dict[Any, tuple[Node, bool, str]] = {}
    for node in marked:
        closure = _closure(node)
        if closure is not None:
            for inner in closure:
                if inner not in copies:
                    copies[inner] = _copy(graph, inner, copies)
            key = (node.target, node.args, tuple(node.kwargs.items()))
            found.setdefault(key, (copies[node], bool(node.meta[MARK]), str(node.meta.get("source"))))
    for node in reversed(marked):
        if not node.users:
            module.graph.erase_node(node)
        else:
            del node.meta[MARK]
    if not found:
        return None
    graph.output(tuple(copy for copy, _, _ in found.values()))
    graph.eliminate_dead_code()
    asked = torch.fx.GraphModule({}, graph)
    names = tuple(str(n.target) for n in graph.nodes if n.op == "placeholder")
    return Conditions(asked, names, tuple(e for _, e, _ in found.values()), tuple(s for _, _, s in found.values()))


def _closure(node: Node) -> list[Node] | None:
    """The node and all it is computed from, in order; None for a constant, or where it needs more than lengths."""
    needed, order = [node], dict.fromkeys([node])
    while needed:
        current = needed.pop()
        if _is_length_of_cache(current) or current.op == "placeholder":
            continue
        for source in current.all_input_nodes:
            is_number = isinstance(source.meta.get("val"), (bool, int, float, tuple))
            if source.op != "placeholder" and not is_number:
                return None
            if source not in order:
                order[source] = None
                needed.append(source)
    if len(order) == 1 or node.op == "placeholder" or any(type(a) is int and a == 1 for a in node.args):
        return None
    position = {n: i for i, n in enumerate(node.graph.nodes)}
    return sorted(order, key=position.__getitem__)


def _is_length_of_cache(node: Node) -> bool:
    return node.op == "call_method" and node.target == "get_seq_length"


def _copy(graph: torch.fx.Graph, node: Node, copies: dict[Node, Node]) -> Node:
    if _is_length_of_cache(node):
        known = next((n for n in graph.nodes if n.op == "placeholder" and n.target == _PAST), None)
        return known if known is not None else _placeholder(graph, _PAST)
    if node.op == "placeholder":
        return _placeholder(graph, str(node.target))
    return graph.create_node(
        node.op, node.target, map_arg(node.args, copies.__getitem__), map_arg(node.kwargs, copies.__getitem__)
    )


def _placeholder(graph: torch.fx.Graph, name: str) -> Node:
    """In front of everything else."""
    first = next((n for n in graph.nodes if n.op != "placeholder"), None)
    if first is None:
        return graph.placeholder(name)
    with graph.inserting_before(first):
        return graph.placeholder(name)
