"""A pickled graph module is the same graph, with the same names, meta and weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from passes.fx import node_meta
from passes.fx.lazy_graph_module import LazyGraphModule
from passes.ops.comm import all_reduce, using


class Doubling:
    """Stands for the other ranks: each sum is of two equal terms."""

    tp_rank = 0

    def all_reduce(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        return x * 2


def small() -> LazyGraphModule:
    """linear, tied to a second one; an operator of torch.ops; a collective; a buffer that no checkpoint holds."""
    root = nn.Module()
    root.first, root.second = nn.Linear(3, 3), nn.Linear(3, 3)
    root.second.weight = root.first.weight
    root.register_buffer("shift", torch.arange(3.0), persistent=False)
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    both = graph.call_module("second", (graph.call_module("first", (x,)),))
    total = graph.call_function(all_reduce, (both,), {"axis": "tp"})
    length = graph.call_function(torch.ops.aten.sym_size.int, (x, 0))
    node_meta.set_val(length, 4)
    node_meta.set_source(length, "model.py:7")
    shifted = graph.call_function(torch.add, (total, graph.get_attr("shift")))
    graph.output({"y": graph.call_method("reshape", (shifted, (length, 3))), "n": (length, [None, 0.5])})
    module = LazyGraphModule(root, graph, class_name="SmallRank1")
    module._non_persistent_buffers_set.add("shift")
    return module


def pickled(module: LazyGraphModule) -> LazyGraphModule:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy])
def test_a_copy_is_the_same(copied: Callable[[LazyGraphModule], LazyGraphModule]) -> None:
    module, x = small(), torch.randn(4, 3)
    other = copied(module)
    assert other.code == module.code and type(other).__name__ == "SmallRank1"
    for mine, its in zip(module.graph.nodes, other.graph.nodes, strict=True):
        assert (its.name, node_meta.everything(its)) == (mine.name, node_meta.everything(mine))
    assert other.state_dict().keys() == module.state_dict().keys() == {
        f"{layer}.{name}" for layer in ("first", "second") for name in ("weight", "bias")
    }
    assert other.first.weight is other.second.weight
    assert other.first.weight is not module.first.weight
    with using(Doubling()):
        wanted = module(x)["y"]
        assert torch.equal(other(x)["y"], wanted)
        assert torch.equal(torch.fx.Interpreter(other).run(x)["y"], wanted)
    module.eval()
    assert not copied(module).training


def test_a_function_without_a_name_is_refused_by_name() -> None:
    graph = torch.fx.Graph()
    graph.output(graph.call_function(lambda x: x, (graph.placeholder("x"),)))
    with pytest.raises(pickle.PicklingError, match=r"_lambda_ calls test_a.*compiled.save"):
        pickle.dumps(LazyGraphModule({}, graph))
