"""BoundGraph against the graph that it was made of: the same numbers, of the weights as they are at each run."""

import pytest
import torch
from torch import nn

from autodist_fx.runtime.execution.bound_graph import BoundGraph
from passes.ops.parallel_layers import ColumnParallelLinear


class Block(nn.Module):
    """Products of one input with and without biases, wide ones and narrow ones, and a table that is read twice."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.q, self.k, self.v = nn.Linear(8, 6, bias=False), nn.Linear(8, 2, bias=False), nn.Linear(8, 2)
        self.gate, self.up = nn.Linear(8, 24, bias=False), ColumnParallelLinear(8, 24, bias=False, dtype=torch.float32)
        self.up.weight = nn.Parameter(torch.randn(24, 8))
        self.down = nn.Linear(24, 8)
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, ids):
        x = self.table(ids) * self.scale
        mixed = torch.cat([self.q(x), self.k(x), self.v(x)], -1)
        wide = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return {"logits": nn.functional.linear(wide, self.table.weight), "mixed": mixed}


class LayersAreLeaves(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, ColumnParallelLinear) or super().is_leaf_module(module, name)


@pytest.fixture
def graph():
    torch.manual_seed(0)
    block = Block()
    graph = LayersAreLeaves().trace(block)
    return torch.fx.GraphModule(block, graph).double().requires_grad_(False)


IDS = torch.arange(12).view(3, 4)


def assert_same(graph, bound):
    found, true = bound({"ids": IDS}), graph(IDS)
    for name in true:
        torch.testing.assert_close(found[name], true[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_same_numbers_from_fewer_products(graph, dtype):
    """float32 weights are moved, which the emitted graph then reads where they are."""
    graph = graph.to(dtype)
    before, state = graph(IDS), {name: x.clone() for name, x in graph.state_dict().items()}
    bound = BoundGraph(graph)
    found = bound({"ids": IDS})
    assert found.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(found[name], value)
        torch.testing.assert_close(graph(IDS)[name], value)
    products = [node for node in bound.module.graph.nodes if node.target is nn.functional.linear]
    assert len(products) == 4  # q|k|gate|up, v, which has a bias, down, logits
    assert all(torch.equal(x, state[name]) for name, x in graph.state_dict().items())


def test_weights_are_held_once(graph):
    """Nothing keeps the memory that weights were in before they became parts of one."""
    graph = graph.float()
    BoundGraph(graph)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in graph.parameters()}
    assert sum(storages.values()) == sum(x.nbytes for x in graph.parameters())


def test_what_is_changed_later_is_seen(graph):
    bound = BoundGraph(graph)
    assert_same(graph, bound)
    graph.load_state_dict({name: x * 2 for name, x in graph.state_dict().items()})
    assert_same(graph, bound)
    graph.k.weight = nn.Parameter(torch.randn(2, 8).double(), requires_grad=False)
    assert_same(graph, bound)
    graph.gate.weight.data = torch.randn(24, 8).double()
    assert_same(graph, bound)
    graph.down.register_forward_hook(lambda module, given, output: output + 1)
    assert_same(graph, bound)
    graph.float()
    assert bound({"ids": IDS})["logits"].dtype == torch.float32


def test_hooks_of_the_graph_itself_run(graph):
    bound, called = BoundGraph(graph), []
    handle = graph.register_forward_pre_hook(lambda *_: called.append(1))
    assert_same(graph, bound)
    assert len(called) == 2  # of the bound graph's run, and of the emitted one's
    handle.remove()
    bound({"ids": IDS})
    assert len(called) == 2


def test_a_second_graph_of_the_same_weights_finds_them_merged(graph):
    graph = graph.float()
    first = BoundGraph(graph)
    places = [x.data_ptr() for x in graph.parameters()]
    second = BoundGraph(graph)
    assert [x.data_ptr() for x in graph.parameters()] == places
    assert torch.equal(first({"ids": IDS})["logits"], second({"ids": IDS})["logits"])


def test_weights_with_gradients_stay_where_they_are(graph):
    graph = graph.float().requires_grad_()
    places = [x.data_ptr() for x in graph.parameters()]
    bound = BoundGraph(graph)
    bound({"ids": IDS})["logits"].sum().backward()
    assert [x.data_ptr() for x in graph.parameters()] == places and graph.gate.weight.grad is not None


def test_an_error_names_the_node(graph):
    bound = BoundGraph(graph)
    assert {node.name for node in bound.module.graph.nodes} >= {"down", "silu", "cat"}
