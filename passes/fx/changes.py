"""graph_changes: what passes did to a graph, node by node, counted by kind.

    inserted  all_reduce: 61, all_gather: 1
    replaced  Linear -> ColumnParallelLinear: 90, Linear -> RowParallelLinear: 60
    removed   mul: 4
    changed   reshape: 90
    rewired   add: 60

Passes keep the names of the nodes that they leave or replace, so a name says which node became which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.fx

from passes.fx.text import node_kind, node_text


@dataclass(frozen=True, slots=True)
class GraphChanges:
    """Counts of what passes did to a graph: (kind, how many), most first. A kind is an op's name or a module's class,
    "A -> B" where one replaced another."""

    inserted: tuple[tuple[str, int], ...]
    replaced: tuple[tuple[str, int], ...]  # other kind
    removed: tuple[tuple[str, int], ...]
    changed: tuple[tuple[str, int], ...]  # same kind, but other constants or shapes: "9 heads" became "6 heads"
    rewired: tuple[tuple[str, int], ...]  # the same, but reads other nodes

    def __bool__(self) -> bool:
        return any(found for _, found in self._parts())

    def __str__(self) -> str:
        """Formats a line for each of the five that happened; "" where the graphs are the same."""
        lines = [(name, ", ".join(f"{kind}: {n}" for kind, n in found)) for name, found in self._parts() if found]
        return "\n".join(f"{name:9} {text}" for name, text in lines)

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts for json.dumps."""
        return {name: dict(found) for name, found in self._parts()}

    def _parts(self) -> list[tuple[str, tuple[tuple[str, int], ...]]]:
        return [(name, getattr(self, name)) for name in ("inserted", "replaced", "removed", "changed", "rewired")]


def graph_changes(before: torch.fx.GraphModule, after: torch.fx.GraphModule) -> GraphChanges:
    """Compares two graphs by the names of their nodes; every node of either is counted at most once."""
    old, new = ({node.name: node for node in module.graph.nodes} for module in (before, after))
    found: dict[str, list[str]] = {part: [] for part in ("inserted", "replaced", "removed", "changed", "rewired")}
    for name, node in old.items():
        kind = node_kind(before, node)
        if name not in new:
            found["removed"].append(kind)
            continue
        became = node_kind(after, new[name])
        if became != kind:
            found["replaced"].append(f"{kind} -> {became}")
        elif node_text(before, node, named=False) != node_text(after, new[name], named=False):
            found["changed"].append(kind)
        elif node_text(before, node) != node_text(after, new[name]):
            found["rewired"].append(kind)
    found["inserted"] = [node_kind(after, node) for name, node in new.items() if name not in old]
    return GraphChanges(**{part: _counted(kinds) for part, kinds in found.items()})


def _counted(kinds: Iterable[str]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(Counter(kinds).items(), key=lambda item: (-item[1], item[0])))
