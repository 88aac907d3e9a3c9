"""A pass is `(graph_module, ctx) -> PassResult`; a pipeline is a tuple of passes, run one after the other.

    each pass:  run it  >  stamp the nodes that it made or changed  >  check the keys of node.meta  >  note its counts

Settings of a pass are bound where the tuple stands (functools.partial). A pass is named after its file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch.fx
from torch.fx import Node

from cost_model.text_tables import table
from passes.fx import node_meta
from passes.fx.node_meta import PassRecord, Phase, Stamp


@dataclass(frozen=True, slots=True)
class PassResult:
    """The graph that a pass leaves, and what it did: how many places it found to work on, nodes inserted and removed.

    No matches where some are expected is a finding: a pattern that no longer fits what torch or a model writes.
    """

    graph_module: torch.fx.GraphModule = field(repr=False, compare=False)
    matches: int = 0
    inserted: int = 0
    removed: int = 0


@dataclass
class PassContext:
    """The knowledge that all passes of a pipeline share: how far the graph has come, and what the passes before did."""

    phase: Phase
    history: list[PassRecord] = field(default_factory=list, kw_only=True)


C = TypeVar("C", bound=PassContext)
Pass = Callable[[torch.fx.GraphModule, C], PassResult]


class GraphEdit:
    """Counts what a pass does to a graph in place: made before the first change, asked for a result after the last."""

    def __init__(self, graph_module: torch.fx.GraphModule) -> None:
        self._graph_module = graph_module
        self._before = set(graph_module.graph.nodes)

    def result(self, matches: int) -> PassResult:
        """Counts the nodes that were inserted and removed since this edit began."""
        kept = inserted = 0
        for node in self._graph_module.graph.nodes:
            if node in self._before:
                kept += 1
            else:
                inserted += 1
        return PassResult(self._graph_module, matches, inserted, len(self._before) - kept)


def run_passes(
    passes: Sequence[Pass[C]],
    graph_module: torch.fx.GraphModule,
    ctx: C,
    after: Callable[[str, torch.fx.GraphModule], None] | None = None,
) -> torch.fx.GraphModule:
    """Runs the passes in order and returns the graph that the last one leaves. `after` gets each pass's name and the
    graph that it left.

    Nodes that a pass made or changed get its stamp, and `ctx.history` its counts. Raises MetaError for a node whose
    keys are not those of `ctx.phase`.
    """
    stamper = _Stamper(graph_module)
    for one in passes:
        result = one(graph_module, ctx)
        graph_module = result.graph_module
        stamper.stamp(graph_module, pass_file(one))
        node_meta.check(graph_module, ctx.phase)
        ctx.history.append(PassRecord(pass_name(one), result.matches, result.inserted, result.removed))
        if after is not None:
            after(pass_name(one), graph_module)
    return graph_module


def pass_file(one: Pass[Any]) -> str:
    """Returns the file that a pass is in, within passes/: "partition/insert_collectives"."""
    function = one.func if isinstance(one, functools.partial) else one
    return str(function.__module__).removeprefix("passes.").replace(".", "/")


def pass_name(one: Pass[Any]) -> str:
    """Returns the name of a pass, which is its function's, also where settings are bound."""
    return pass_file(one).rpartition("/")[2]


def history_text(history: Iterable[PassRecord]) -> str:
    """Formats a table, one pass a line, in the order in which they ran."""
    rows = [(r.name, str(r.matches), str(r.inserted), str(r.removed)) for r in history]
    return "\n".join(table([("pass", "matches", "inserted", "removed"), *rows], left=(0,)))


# -- stamps ------------------------------------------------------------------------------------------------------------


class _Stamper:
    """Compares every node with what it was before a pass.

    torch.fx makes a new tuple at each change of a node's arguments: nearly all nodes are told from those that changed
    by the identity of three objects. (`node.args` is a property that takes 20 times as long as the slot behind it.)
    """

    def __init__(self, graph_module: torch.fx.GraphModule) -> None:
        self._seen = {node: (node.target, node._args, node._kwargs) for node in graph_module.graph.nodes}
        self._stamps: dict[tuple[str, str], Stamp] = {}

    def stamp(self, graph_module: torch.fx.GraphModule, name: str) -> None:
        """Stamps the nodes that the pass `name` made, changed or rewired since the last call."""
        seen, new = self._seen, self._made(name, name)  # seen: also nodes that are gone
        for node in graph_module.graph.nodes:
            was = seen.get(node)
            if was is None:
                node_meta.set_stamp(node, new)
            elif was[1] is node._args and was[0] is node.target and was[2] is node._kwargs:
                continue
            elif was != (node.target, node._args, node._kwargs):
                rewired = was[0] == node.target and _differ_by_nodes(was[1:], (node._args, node._kwargs))
                node_meta.set_stamp(node, self._made(node_meta.made_by(node), name) if rewired else new)
            seen[node] = node.target, node._args, node._kwargs

    def _made(self, made_by: str, wired_by: str) -> Stamp:
        key = made_by, wired_by
        if key not in self._stamps:
            self._stamps[key] = Stamp(made_by, wired_by)
        return self._stamps[key]


def _differ_by_nodes(a: Any, b: Any) -> bool:
    """Returns whether two nodes' arguments are the same but for which nodes stand in them."""
    if isinstance(a, Node) or isinstance(b, Node):
        return isinstance(a, Node) and isinstance(b, Node)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_differ_by_nodes, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_differ_by_nodes(a[k], b[k]) for k in a)
    if isinstance(a, slice) and isinstance(b, slice):
        return _differ_by_nodes((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    return bool(a == b)
