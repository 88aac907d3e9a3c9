"""Writes into tensors become values: also into a part of one, and into all of it."""

from __future__ import annotations

import operator

import pytest
import torch
from torch.fx import Graph, GraphModule, Node

from passes.fx import node_meta
from passes.normalize.writes.functionalize import functionalize


def _tensor(graph: Graph, target: object, *args: object) -> Node:
    kind = graph.call_method if isinstance(target, str) else graph.call_function
    node = kind(target, args)  # type: ignore[operator]
    node_meta.set_traced_as_tensor(node, True)
    return node


@pytest.mark.parametrize("index", [1, (0, 2), (slice(None), 1), (slice(0, 2), 3)])
@pytest.mark.parametrize("write", ["copy_", "zero_", "add_", "setitem"])
def test_a_write_into_a_part_changes_the_whole(index: object, write: str) -> None:
    """Reads before the write keep the old value; reads after it have the new one, the part and the whole alike."""
    graph = Graph()
    x = graph.placeholder("x")
    node_meta.set_traced_as_tensor(x, True)
    before = _tensor(graph, operator.add, x, 0)
    part = _tensor(graph, operator.getitem, x, index)
    if write == "setitem":
        graph.call_function(operator.setitem, (part, 0, 7.0))
    elif write == "copy_":
        _tensor(graph, write, part, _tensor(graph, operator.mul, part, 5.0))
    else:
        _tensor(graph, write, part, *([3.0] if write == "add_" else []))
    after = _tensor(graph, operator.add, x, 0)
    graph.output((before, part, after))
    module = GraphModule(torch.nn.Module(), graph)
    given = torch.rand(3, 5, 4)
    kept = given.clone()
    expected = module(given.clone())
    functionalize(module)
    module.recompile()
    found = module(given)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(given, kept), "nothing is written any more"
    assert not torch.equal(found[0], found[2])
