"""Steps of what experts compute between their two products: equal to the module's own Python, or no steps at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from autodist_fx.tracing.control_flow.expert_gates import traced_gate
from passes.ops.experts import gate_function

INNER = 5


class Experts(nn.Module):
    def __init__(self, gate: Callable[[Any, Any], Any], act: nn.Module | None = None) -> None:
        super().__init__()
        self._gate, self.act_fn, self.limit = gate, act if act is not None else nn.SiLU(), 0.4

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self._gate(self, gate_up)
        return made


def plain(self: Any, gate_up: Any) -> Any:
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate) * up


def by_turns(self: Any, gate_up: Any) -> Any:
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate, up = gate.clamp(min=None, max=self.limit), up.clamp(min=-self.limit, max=self.limit)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def behind_the_activation(self: Any, gate_up: Any) -> Any:
    gate, up = torch.split(gate_up, INNER, -1)
    return self.act_fn(gate).clamp(max=self.limit) * up.clamp(-self.limit, self.limit)


def up_first(self: Any, gate_up: Any) -> Any:
    return gate_up[..., :INNER] * F.gelu(gate_up[..., INNER:], approximate="tanh")


@pytest.mark.parametrize(
    ("gate", "parts"), [(plain, "halves"), (by_turns, "pairs"), (behind_the_activation, "halves"), (up_first, "halves")]
)
def test_a_gate_is_what_the_module_computes(gate: Callable[[Any, Any], Any], parts: str) -> None:
    module, x = Experts(gate), torch.randn(7, 2 * INNER, dtype=torch.float64)
    traced = traced_gate(module, True, INNER)
    assert traced is not None and traced[0] == parts
    given = (x[:, ::2], x[:, 1::2]) if parts == "pairs" else x.chunk(2, -1)
    assert torch.equal(gate_function(traced[1])(*given), module._apply_gate(x))


@pytest.mark.parametrize(
    "name", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "relu2", "quick_gelu", "tanh", "linear"]
)
def test_an_activation_alone(name: str) -> None:
    module, x = Experts(plain, ACT2FN[name]), torch.randn(7, INNER, dtype=torch.float64)
    traced = traced_gate(module, False, INNER)
    assert traced is not None and traced[0] == "one"
    assert torch.equal(gate_function(traced[1])(x, x), module.act_fn(x))


def looks_at_values(self: Any, gate_up: Any) -> Any:
    gate, up = gate_up.chunk(2, dim=-1)
    return up if gate.sum() > 0 else gate * up


def normalises(self: Any, gate_up: Any) -> Any:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate.softmax(-1) * up


def casts(self: Any, gate_up: Any) -> Any:
    gate, up = gate_up.chunk(2, dim=-1)
    return (self.act_fn(gate.float()) * up.float()).to(gate.dtype)


def mixes_neighbours(self: Any, gate_up: Any) -> Any:
    return gate_up[..., :INNER] * gate_up[..., 1 : INNER + 1]


def of_both_layouts(self: Any, gate_up: Any) -> Any:
    return gate_up[..., :INNER] * gate_up[..., ::2]


def takes_apart_what_it_computed(self: Any, gate_up: Any) -> Any:
    gate, up = F.silu(gate_up).chunk(2, dim=-1)
    return gate * up


def adds_a_tensor(self: Any, gate_up: Any) -> Any:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * up + torch.ones(INNER)


def gives_a_part(self: Any, gate_up: Any) -> Any:
    return gate_up.chunk(2, dim=-1)[0]


@pytest.mark.parametrize(
    "gate",
    [looks_at_values, normalises, casts, mixes_neighbours, of_both_layouts, takes_apart_what_it_computed, adds_a_tensor,
     gives_a_part],
)  # fmt: skip
def test_anything_else_is_no_list_of_steps(gate: Callable[[Any, Any], Any]) -> None:
    assert traced_gate(Experts(gate), True, INNER) is None
