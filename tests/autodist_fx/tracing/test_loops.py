"""Loops over lengths: each becomes one node, and computes what the loop computes at every length."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import autodist_fx as adx
from autodist_fx.tracing import trace
from autodist_fx.tracing.control_flow.loops.range_loops import outlined_loops
from tests.support.graphs.loops import Chunked, InPlaceScan, KeywordScan, ListScan, traced_loop


class UnrolledLoop(nn.Module):
    """A loop of few steps, known while tracing: ordinary nodes."""

    def forward(self, x):
        for step in range(3):
            x = x * (step + 1)
        return x


def _outlined(graph_module: torch.fx.GraphModule) -> list[str]:
    names = [getattr(node.target, "__name__", "") for node in graph_module.graph.nodes]
    return [name for name in names if name.startswith("outlined")]


@pytest.mark.parametrize("make", [ListScan, InPlaceScan, KeywordScan])
def test_a_loop_over_a_length_is_one_node_for_every_length(make: type[nn.Module]) -> None:
    module = make()
    graph_module = traced_loop(module, torch.rand(2, 7, 4))
    assert len(_outlined(graph_module)) == 1
    for length in (1, 2, 7, 12):
        x = torch.rand(2, length, 4)
        kept = x.clone()
        for found, expected in zip(graph_module(x), module(x), strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(x, kept)


def test_the_branch_that_is_taken_has_its_own_loop() -> None:
    module = ListScan()
    module.block = 1
    graph_module = traced_loop(module, torch.rand(2, 7, 4))
    (name,) = _outlined(graph_module)
    assert name != _outlined(traced_loop(ListScan(), torch.rand(2, 7, 4)))[0]
    x = torch.rand(3, 5, 4)
    assert torch.equal(graph_module(x)[0], module(x)[0])


def test_short_loops_of_known_counts_are_written_out() -> None:
    graph_module = traced_loop(UnrolledLoop(), torch.rand(2, 7, 4))
    assert not _outlined(graph_module)
    x = torch.rand(3, 5, 4)
    assert torch.equal(graph_module(x), x * 6)


def test_functions_and_globals_are_as_before() -> None:
    code, names = ListScan.forward.__code__, set(vars(sys.modules[ListScan.__module__]))
    with pytest.raises(RuntimeError), outlined_loops([ListScan.__module__]):
        assert ListScan.forward.__code__ is not code
        raise RuntimeError
    assert ListScan.forward.__code__ is code
    assert set(vars(sys.modules[ListScan.__module__])) == names


def test_a_state_that_an_earlier_call_left_is_not_part_of_the_graph() -> None:
    """A recurrent layer may keep its state as an attribute; a new sequence starts without."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=2))  # fmt: skip

    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last: torch.Tensor | None = None
            self.scale = torch.tensor(2.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * self.scale if self.last is None else x + self.last
            self.last = x
            return y

    model.model.norm = Remembering()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        graph_module = trace(model, input_names=["input_ids"]).graph_module
        graph_module.load_state_dict(model.state_dict(), strict=False, assign=True)
        assert torch.allclose(graph_module(input_ids=ids)["logits"], expected)


@torch.no_grad()
def test_a_loop_over_what_chunks_leave_takes_any_number_of_tokens() -> None:
    """No example of the graph with the loop may be a multiple of the chunk: the loop has nothing to stack there."""
    model = Chunked(LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                num_attention_heads=2, num_key_value_heads=2)).double().eval()  # fmt: skip
    compiled = adx.compile(model, tp=2, input_names=("input_ids",))
    for tokens in (13, 9, 16):
        ids = torch.arange(2 * tokens).view(2, tokens) % 16
        found = compiled.simulate(input_ids=ids).logits
        assert torch.allclose(found, model(input_ids=ids, use_cache=False).logits, rtol=1e-9, atol=1e-12)
