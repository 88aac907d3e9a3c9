"""Questions that a model's Python asks of traced values, and that one graph answers for all inputs."""

from __future__ import annotations

import logging
import operator
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx import Graph
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from transformers import LlamaConfig, LlamaForCausalLM

import autodist_fx as adx
from autodist_fx.errors import TracingError
from autodist_fx.tracing.control_flow.value_ranges import value_range
from tests.support.models import relative_error

logger = logging.getLogger(__name__)
HIDDEN = 16
IDS = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(3))


class Guarded(nn.Module):
    """Errors about values, and about how many there are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x.abs() > 1e9).any():
            raise ValueError("too large")
        if not bool(x.isfinite().all()) or not x.abs().sum() > 0:
            raise ValueError("not finite, or nothing")
        if x[x > -1e9].numel() != x.numel():
            raise ValueError("some are missing")
        return x * 2


class Warned(nn.Module):
    """Words about values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] and (x.abs() > 1e9).any():
            logger.warning("large")
        if not (x < 1e9).all():
            warnings.warn("large", stacklevel=1)
        return x * 2


class Nothing(nn.Module):
    """None goes through an Identity, and is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor, more: torch.Tensor | None = None) -> torch.Tensor:
        more = self.other(more)
        return self.norm(x) if more is None else x + more


class Numpy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(x.shape[0], np.prod(x.shape[1:]))
        return (flat / np.sqrt(x.shape[-1])).view(x.shape) * (np.int64(9) - np.int64(2) * x.shape[-1])


class Table(nn.Module):
    """Keeps a table of its parameter, which it makes when it is told that it does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.rand(4, dtype=torch.float64))
        self.register_buffer("places", torch.arange(HIDDEN) % 4)

    def train(self, mode: bool = True) -> Table:
        super().train(mode)
        self.table = None if mode else self.bias[self.places]
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.table = self.table.to(x.device)
        return x + self.table


class Kept(nn.Module):
    """Keeps what it once computed of its parameters, in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(HIDDEN, dtype=torch.float64))
        self.powers = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.powers is None:
            self.powers = (self.scale, self.scale**2)
        return x * self.powers[0] + self.powers[1]


class Windows(nn.Module):
    """Overlapping windows by as_strided, of a tensor that lies otherwise in memory; padded at its end if need be."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding = (4 - x.shape[1] % 4) % 4
        if padding > 0:
            x = F.pad(x, (0, 0, 0, padding))
        x = x.transpose(0, 1).contiguous().transpose(0, 1).view(x.shape)
        size, stride = list(x.size()), list(x.stride())
        count = torch.div(size[1], 2, rounding_mode="trunc") - 1
        windows = x.as_strided(size=(size[0], count, 4, size[2]), stride=(stride[0], 2 * stride[1], *stride[1:]))
        x = x + F.pad(windows.mean(2), (0, 0, 1, size[1] - count - 1)) * 0.5
        if padding > 0:
            x = x[:, :-padding]
        return x


class Normed(nn.Module):
    """A weight that is computed of two others."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = parametrizations.weight_norm(nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64), dim=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class RowByRow(nn.Module):
    """A loop over the batch that writes where values say."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, ends = torch.zeros_like(x), (x[:, :, 0] > 0).sum(-1)
        for i in range(x.shape[0]):
            stop = int(ends[i])
            y[i, :stop] = x[i, :stop].flip(0)
        return x + y


class Languages(nn.Module):
    """Runs of rows of one kind, each through a layer of its own; by default all rows are of one kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kinds = 2 * torch.ones(x.shape[0], device=x.device)
        kinds, lengths = torch.unique_consecutive(kinds, return_counts=True)
        parts = torch.split(x, lengths.tolist(), 0)
        return torch.cat([self.layers[int(k.item())](part) for k, part in zip(kinds, parts, strict=True)], 0)


class Blocks(nn.Module):
    """Goes over blocks of tokens, of which the sizes that it is traced with make one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state, parts = torch.zeros_like(x[:, 0]), []
        for i in range((x.shape[1] + 63) // 64):
            part = x[:, i * 64 : min((i + 1) * 64, x.shape[1])]
            parts.append(part + state[:, None])
            state = state * 0.5 + part.sum(1)
        parts = torch.cat(parts, 1)
        return parts


def model_with(module: nn.Module) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3)  # fmt: skip
    model = LlamaForCausalLM(config).double()
    model.model.norm = module
    return model.eval()


def error_of(module: nn.Module, tp: int = 2, pp: int = 1, length: int = 7) -> float:
    model, ids = model_with(module), IDS[:, :length]
    expected = model(input_ids=ids, use_cache=False).logits.detach()  # with gradients: what it keeps is no leaf
    got = adx.compile(model, tp=tp, pp=pp, input_names=("input_ids",)).simulate(input_ids=ids).logits.detach()
    return relative_error(got, expected)


@pytest.mark.drawn(5)
@pytest.mark.parametrize("make", [Guarded, Warned, Nothing, Numpy, Table, Kept, Windows, Normed, RowByRow, Languages])
def test_it_has_one_graph_and_computes_the_same(make: type[nn.Module]) -> None:
    assert error_of(make()) < 1e-12


def test_a_slice_that_ends_before_the_end_may_end_there() -> None:
    """The trace pads; a call that needs no padding cuts nothing off."""
    model = model_with(Windows())
    compiled = adx.compile(model, tp=1, input_names=("input_ids",))
    for length in (4, 5, 6):
        ids = IDS[:, :length]
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits
        assert relative_error(compiled.simulate(input_ids=ids).logits, expected) < 1e-12


def test_blocks_that_are_one_at_the_sizes_of_the_trace_are_counted_at_each_call() -> None:
    model = model_with(Blocks())
    compiled = adx.compile(model, tp=2, input_names=("input_ids",))
    for length in (7, 64, 150):
        ids = torch.randint(0, 32, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits
        assert relative_error(compiled.simulate(input_ids=ids).logits, expected) < 1e-12


def test_ranges_of_values_that_are_used_twice_are_found_once() -> None:
    """Each of 100 sums is of one value twice: followed each time, they would be 2 ** 100."""
    graph = Graph()
    node = graph.placeholder("attention_mask")
    tracer = SimpleNamespace(examples_of={node: torch.ones(2, 3, dtype=torch.long, device="meta")})
    for _ in range(100):
        node = graph.call_function(operator.add, (node, node))
    assert value_range(node, tracer) == (0.0, 2.0**100)


class AsksForPadding(nn.Module):
    """Works only where something is padded, of two kinds; and where something is of a kind that no mask knows."""

    def forward(self, x: torch.Tensor, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        extended = (1.0 - attention_mask[:, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        if (extended > 0).flatten().any().item():
            x = x * 1000
        padded = ids.eq(0)
        if padded.any():
            x = x.masked_fill(padded[:, :, None], 0.0)
        return x


class Asking(LlamaForCausalLM):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, Any]:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return {"logits": self.lm_head(self.asks(hidden, input_ids, attention_mask))}


def test_masks_hold_zeros_and_ones_and_padding_may_be_there() -> None:
    model = model_with(nn.Identity())
    model.__class__, model.asks = Asking, AsksForPadding()
    compiled = adx.compile(model, tp=2, input_names=("input_ids", "attention_mask"))
    for ids in (IDS.clamp(min=1), IDS.clamp(min=1) * (torch.arange(7) > 1)):
        inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        with torch.no_grad():
            expected = model(**inputs)["logits"]
        kept = ids != 0  # a row that may see nothing is nobody's business
        assert relative_error(compiled.simulate(**inputs).logits[kept], expected[kept]) < 1e-12


class FillsTooLargeANumber(nn.Module):
    def forward(self, x: torch.Tensor, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return x + x.float().fill_(torch.finfo(x.dtype).min).type_as(x)


def test_a_number_that_a_dtype_has_not_is_refused_while_tracing() -> None:
    """The model raises, too, when it runs; a meta tensor takes any number."""
    model = model_with(nn.Identity())
    model.__class__, model.asks = Asking, FillsTooLargeANumber()
    with pytest.raises(TracingError, match=r"float32 has no number -1.8e\+308"):
        adx.compile(model, tp=2, input_names=("input_ids", "attention_mask"))


class Scaled(nn.Module):
    """A module with parameters, of which one branch is traced alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))


class Chooses(Scaled):
    """No error follows, and the values decide: there is no one graph of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x > 0).any():
            x = x * 2
        return x


class WarnsOrDoes(Scaled):
    """A warning, and otherwise more than that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x > 0).any():
            logger.warning("positive")
        else:
            x = x * 2
        return x


class Marks(Scaled):
    """Zeros are no zeros any more once something is written into them, or into a view of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        marks = torch.zeros_like(x)
        marks[:, 0] = 1.0
        others = torch.zeros_like(x)
        others.view(-1, HIDDEN).fill_(1.0)
        if (marks > 0).any() or (others > 0).any():
            x = x * 2
        return x


@pytest.mark.parametrize(
    "make, condition", ((Chooses, r"\(x > 0\)"), (WarnsOrDoes, r"\(x > 0\)"), (Marks, r"\(marks > 0\)"))
)
def test_a_condition_on_values_is_refused_by_its_line(make: type[nn.Module], condition: str) -> None:
    with pytest.raises(TracingError, match=rf"test_what_python_asks.py:\d+ \(`if {condition}.any\(\)"):
        error_of(make())


class CountsRuns(nn.Module):
    """An op that torch has no shapes of without values, in whole windows of a length."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = x.shape[1] // 4 * 4
        return x * torch.unique_consecutive(x[:, :whole]).sum()


def test_an_op_without_shapes_is_refused() -> None:
    with pytest.raises(TracingError, match=r"LlamaForCausalLM refuses these inputs: aten::unique_consecutive"):
        adx.compile(model_with(CountsRuns()), tp=2)
