"""Conditions on values in modules without parameters: both branches are traced, and what a call leaves is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import autodist_fx as adx
from autodist_fx.errors import TracingError
from tests.support.models import relative_error

HIDDEN = 16
EXACT = 1e-12


def ids_of(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 32, (batch, length), generator=torch.Generator().manual_seed(length))


def model_with(module: nn.Module) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3)  # fmt: skip
    model = LlamaForCausalLM(config).double()
    model.model.norm = module
    return model.eval()


def errors(module: nn.Module, batches: list[torch.Tensor], **mesh: int) -> list[float]:
    """Returns the errors of the split against the model, call by call."""
    model = model_with(module)
    compiled = adx.compile(model, input_names=("input_ids",), **mesh)
    found = []
    with torch.no_grad():
        for ids in batches:
            expected = model(input_ids=ids, use_cache=False).logits
            found.append(relative_error(compiled.simulate(input_ids=ids).logits, expected))
    return found


class Nested(nn.Module):
    """Branches in branches, one of them asked twice, and one that returns early; two results each."""

    def __init__(self, middle: float) -> None:
        super().__init__()
        self.middle = middle

    def choose(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        largest = x.max()
        if largest < self.middle:
            return x * 3, 0.5
        if x.sum() > 0:
            x = x * 2 if largest < self.middle + 1 else x.flip(-1)
        elif not x.min() < -self.middle:
            return x - 1, 1.5
        return x, 1.0 if largest < self.middle else 2.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, scale = self.choose(x)
        return x * scale


@pytest.mark.parametrize("middle", [0.5, 1.5, 9.0])
def test_each_branch_gives_what_the_model_gives(middle: float) -> None:
    assert max(errors(Nested(middle), [ids_of(n) for n in (3, 4, 5, 6, 7, 9)], tp=2)) < EXACT


class Remembers(nn.Module):
    """Keeps, as an attribute and in a buffer, the largest sum so far and how often it grew; starts anew at small ones.

    What it adds to its input depends on both.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most, self.grown = 1.0, 0
        self.register_buffer("table", torch.arange(HIDDEN, dtype=torch.float64), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.abs().sum() / 40
        if size > self.most:
            self.most, self.grown = size, self.grown + 1
            self.register_buffer("table", torch.arange(HIDDEN, device=x.device) * size, persistent=False)
        if size < 2:
            self.most, self.grown = 1.0, 0
        return x + self.table + self.grown


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"tp": 2, "pp": 2}])
def test_buffers_that_a_call_writes_are_read_by_the_next(mesh: dict[str, int]) -> None:
    """Growing, between, growing again, starting anew, and from there."""
    batches = [ids_of(n, batch) for n, batch in ((5, 2), (9, 2), (7, 2), (12, 3), (3, 1), (5, 2), (4, 2))]
    assert max(errors(Remembers(), batches, **mesh)) < EXACT


def test_a_graph_made_later_goes_on_from_what_the_others_left() -> None:
    """A call with a mask is another graph than one without."""
    model = model_with(Remembers())
    compiled = adx.compile(model, tp=2, pp=2, input_names=("input_ids",))
    with torch.no_grad():
        for length, masked in ((9, False), (6, True), (14, True), (8, False), (2, True), (6, False)):
            ids = ids_of(length)
            inputs = {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if masked else {})
            expected = model(**inputs, use_cache=False).logits
            assert relative_error(compiled.simulate(**inputs).logits, expected) < EXACT, length
    assert len(compiled.variants) == 2  # what the model's own calls leave on it is no change of the model



def test_a_split_starts_from_what_calls_of_the_model_left_before() -> None:
    model = model_with(Remembers())
    with torch.no_grad():
        model(input_ids=ids_of(11), use_cache=False)
        compiled = adx.compile(model, tp=2, input_names=("input_ids",))
        expected = model(input_ids=ids_of(6), use_cache=False).logits
        assert relative_error(compiled.simulate(input_ids=ids_of(6)).logits, expected) < EXACT


def test_saving_keeps_the_state_of_a_new_model_and_not_of_the_calls_since(tmp_path: Any) -> None:
    model = model_with(Remembers())
    compiled = adx.compile(model, tp=2, input_names=("input_ids",))
    compiled.simulate(input_ids=ids_of(20))
    compiled.save(tmp_path / "split")
    loaded = adx.load(tmp_path / "split")
    with torch.no_grad():
        for length in (6, 12, 6):
            expected = model(input_ids=ids_of(length), use_cache=False).logits
            assert relative_error(loaded.simulate(input_ids=ids_of(length)).logits, expected) < EXACT


def test_checking_in_float64_changes_no_state() -> None:
    model = model_with(Remembers())
    compiled = adx.compile(model, tp=2, input_names=("input_ids",))
    before = {name: buffer.clone() for name, buffer in compiled.graph.named_buffers()}
    compiled.verify(numeric=True)
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in compiled.graph.named_buffers())
    expected = model(input_ids=ids_of(6), use_cache=False).logits.detach()
    assert relative_error(compiled.simulate(input_ids=ids_of(6)).logits, expected) < EXACT


class Kinds(nn.Module):
    """A module that returns a tensor or nothing: no tensor can say which of it it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        more = x * 2 if x.sum() > 0 else None
        self.last = more
        return x if self.last is None else more


class Shapes(nn.Module):
    """A module that leaves an attribute of another shape than before for the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(1, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > self.seen.sum():
            self.seen = x
        return x + self.seen.sum()


class Loops(nn.Module):
    """More ways than can be traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for k in range(6):
            if x.sum() > k:
                x = x + k
        return x


@pytest.mark.parametrize(
    "make, reason",
    [
        (Kinds, r"decides between Proxy\(mul_\d+\) and None, which no graph can select"),
        (Shapes, r"seen is left as .* for the next call, and was \[1\]"),
        (Loops, r"asks for the values of tensors in more than 32 ways"),
    ],
)
def test_branches_with_results_that_no_where_can_join_are_refused_by_name(make: type[nn.Module], reason: str) -> None:
    with pytest.raises(TracingError, match=reason):
        adx.compile(model_with(make()), tp=2, input_names=("input_ids",))
