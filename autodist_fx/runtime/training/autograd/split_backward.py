"""Splits a backward pass in two: gradients of a stage's inputs first, for which the stage before waits; those of its
parameters later (zero-bubble schedules: Qi et al. 2024, https://arxiv.org/abs/2401.10241).

Between both stands autograd's graph. Some of its nodes lead back to an input, the rest to parameters alone. A node of
the first kind in front of one of the second is a junction: for a linear, the node that has gradients of both its input
and its weight. The first pass notes the gradients that come to junctions on its way to the inputs; the second starts
from these and does what the first left out. No node in between runs twice, so neither does a collective: those of ours
have one tensor each, and a junction has two. Parameters that hang on several junctions (a tied weight) have their
gradients taken in the first pass, since from one junction the way may lead to the next.

torch.distributed.pipelining's own (`stage_backward_input`) goes from such junctions, too; it refuses roots that are
views, and for a parameter of several junctions it goes through all between them again, collectives included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Gradient: TypeAlias = torch.Tensor | None


@dataclass(slots=True)
class _Group:
    """Parameters, by their numbers, that hang on one junction, and the gradients that came to it."""

    junction: Node
    parameters: list[int]
    gradients: tuple[Gradient, ...] = ()


@dataclass(slots=True)
class WeightGradients:
    """The rest of a backward pass whose gradients of inputs are there: `finish` returns those of the parameters."""

    _parameters: list[torch.Tensor]
    _found: list[Gradient]
    _groups: list[_Group] = field(default_factory=list)
    _of_roots: list[int] = field(default_factory=list)  # parameters from which no way leads to the inputs' graph
    _roots: tuple[torch.Tensor, ...] = ()
    _known: tuple[torch.Tensor, ...] = ()

    def finish(self) -> list[Gradient]:
        """Return the gradient of each parameter, None where nothing depends on it. For one call: the graph is freed.

        Junctions come in the order of their ops, later ones first, so that collectives behind them come alike on all
        ranks of a tp group.
        """
        with torch.autograd.set_multithreading_enabled(False):
            if self._of_roots:
                wanted = [self._parameters[i] for i in self._of_roots]
                found = torch.autograd.grad(self._roots, wanted, self._known, allow_unused=True)
                self._put(self._of_roots, found)
            for group in self._groups:
                edges = [(GradientEdge(group.junction, i), g) for i, g in enumerate(group.gradients) if g is not None]
                if edges:  # none came to it: nothing of the roots depends on it here
                    wanted = [self._parameters[i] for i in group.parameters]
                    found = torch.autograd.grad(*_columns(edges, wanted), allow_unused=True)
                    self._put(group.parameters, found)
        self._groups, self._of_roots, self._roots, self._known = [], [], (), ()
        return self._found

    def _put(self, numbers: Sequence[int], found: Sequence[Gradient]) -> None:
        for number, gradient in zip(numbers, found, strict=True):
            self._found[number] = gradient


def backward_inputs(
    roots: Sequence[torch.Tensor],
    known: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    parameters: Sequence[torch.Tensor],
) -> tuple[list[Gradient], WeightGradients]:
    """Return (the gradient of each of `inputs`, None where no root depends on it; what is left for the parameters).

    `known[i]` is the gradient of `roots[i]`, of its shape. Inputs and parameters are leaves. Together with `finish`
    this is torch.autograd.grad(roots, [*inputs, *parameters], known, allow_unused=True).
    """
    left = WeightGradients(list(parameters), [None] * len(parameters))
    if not roots:
        return [None] * len(inputs), left
    graph = _Graph(roots, inputs)
    by_junction: dict[Node, _Group] = {}
    early: list[int] = []
    for number, parameter in enumerate(parameters):
        origin = graph.origin(parameter)
        if origin is _ROOTS:
            left._of_roots.append(number)
        elif origin is _SEVERAL:
            early.append(number)
        elif isinstance(origin, Node):
            by_junction.setdefault(origin, _Group(origin, [])).parameters.append(number)
    # as the engine goes back: later ops first
    left._groups = sorted(by_junction.values(), key=lambda group: -group.junction._sequence_nr())
    if left._of_roots:  # else what lies between them and the junctions, such as a loss's, may go
        left._roots, left._known = tuple(roots), tuple(known)
    wanted = [*inputs, *(parameters[i] for i in early)]
    if not wanted:
        return [], left
    hooks = [group.junction.register_prehook(_noting(group)) for group in left._groups]
    try:
        with torch.autograd.set_multithreading_enabled(False):
            found = torch.autograd.grad(
                roots, wanted, known, allow_unused=True, retain_graph=bool(left._groups or left._of_roots)
            )
    finally:
        for hook in hooks:
            hook.remove()
    left._put(early, found[len(inputs) :])
    return list(found[: len(inputs)]), left


def _noting(group: _Group) -> Callable[[tuple[Gradient, ...]], None]:
    def note(gradients: tuple[Gradient, ...]) -> None:
        group.gradients = gradients

    return note


def _columns(
    edges: Sequence[tuple[GradientEdge, torch.Tensor]], wanted: list[torch.Tensor]
) -> tuple[list[GradientEdge], list[torch.Tensor], list[torch.Tensor]]:
    return [edge for edge, _ in edges], wanted, [gradient for _, gradient in edges]


class _Mark:
    """An origin that is no junction."""


_ROOTS, _SEVERAL = _Mark(), _Mark()
_Origin: TypeAlias = Node | _Mark | None


class _Graph:
    """Autograd's graph behind `roots`: which nodes lead back to `inputs`, and on which junction the others hang."""

    def __init__(self, roots: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
        starts = list(dict.fromkeys(get_gradient_edge(root).node for root in roots))
        order = _postorder(starts)
        leads = {get_gradient_edge(x).node for x in inputs}
        for node in order:  # what a node reads comes before it
            if any(before in leads for before, _ in node.next_functions):
                leads.add(node)
        self._origins: dict[Node, _Origin] = {}
        for start in starts:
            if start not in leads:
                self._origins[start] = _ROOTS
        for node in reversed(order):  # what reads a node comes before it
            origin = node if node in leads else self._origins.get(node)
            for before, _ in node.next_functions:
                if before is not None and before not in leads:
                    known = self._origins.get(before, origin)
                    self._origins[before] = origin if known is origin else _SEVERAL

    def origin(self, parameter: torch.Tensor) -> _Origin:
        """Return the junction that a parameter hangs on; _ROOTS where it is the roots themselves; _SEVERAL; None where
        no root depends on it."""
        return self._origins.get(get_gradient_edge(parameter).node)


def _postorder(starts: Sequence[Node]) -> list[Node]:
    """Return all nodes behind `starts`, each after those that it leads to."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(node, False) for node in starts]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(before, False) for before, _ in node.next_functions if before is not None and before not in seen]
    return order
