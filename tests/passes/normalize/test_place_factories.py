"""place_factories: what a model makes without naming a device is made on the device of the graph's inputs."""

from __future__ import annotations

import operator

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from passes.fx.text import graph_text
from passes.normalize.pipeline import normalize
from tests.support.device.pretended import OnDevice, pretended_cuda
from tests.support.graphs.small import examples


def _scaled() -> torch.fx.GraphModule:
    """x [B, S, 12] -> x * sqrt(2) + [0, ..., 11]. Written by hand: fx computes what is made of numbers alone."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    scale = graph.call_function(torch.sqrt, (graph.call_function(torch.tensor, (2.0,), {"dtype": torch.float64}),))
    scaled = graph.call_function(operator.mul, (x, scale))
    graph.output({"y": graph.call_function(operator.add, (scaled, graph.call_function(torch.arange, (12,))))})
    return torch.fx.GraphModule(nn.Module(), graph)


def test_what_is_made_lies_where_the_inputs_are() -> None:
    module = normalize(_scaled(), examples({"x": ("B", "S", 12)}))
    assert_expected_inline(graph_text(module), """\
x : f64[B, S, 12] = input
getattr_1 = getattr(x, 'device')
tensor : f64[] = full((), 2.0, dtype=torch.float64, device=getattr_1)
sqrt : f64[] = sqrt(tensor)
mul : f64[B, S, 12] = mul(x, sqrt)
arange : i64[12] = arange(12, device=getattr_1)
add : f64[B, S, 12] = add(mul, arange)
return {y: add}""")
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    wanted = _scaled()(x)["y"]
    assert torch.equal(module(x)["y"], wanted)
    with pretended_cuda() as events:
        found = module(x.to("cuda:0"))["y"]
    assert isinstance(found, OnDevice) and torch.equal(found.held, wanted)
    assert events.of_graphs() == []


def test_without_it_the_devices_differ() -> None:
    """The test above can fail: as the model has it, the graph adds what is in main memory."""
    with pretended_cuda(), pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cpu"):
        _scaled()(torch.randn(2, 3, 12, dtype=torch.float64).to("cuda:0"))
