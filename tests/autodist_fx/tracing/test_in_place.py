"""Tensors that a model's code writes in place, and lengths that it folds into parts of one size."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

import autodist_fx as adx
from autodist_fx.tracing import trace
from tests.support.models import randomized, relative_error, tiny_config

IDS = torch.arange(3, 21).view(2, 9)


class Writes(LlamaForCausalLM):
    """Writes into what it returns under another name, and into what keeps its dtype."""

    def forward(self, input_ids=None, **keywords):
        hidden = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        before, half = hidden, hidden.float()
        hidden += 1
        hidden *= torch.arange(hidden.shape[1], device=hidden.device)[:, None]
        half -= hidden
        return {"logits": self.lm_head(hidden + before), "before": before, "half": half}


class Folds(LlamaForCausalLM):
    """Hears four samples at a time."""

    def forward(self, input_ids=None, input_values=None, **keywords):
        heard = input_values.reshape(input_values.shape[0], -1, 4).tanh().mean((1, 2))
        hidden = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return {"logits": self.lm_head(hidden * heard[:, None, None])}


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
@torch.no_grad()
def test_what_is_written_in_place_is_read_by_every_name(tp: int, pp: int) -> None:
    model = randomized(Writes(tiny_config("llama")).double().eval())
    found = adx.compile(model, tp=tp, pp=pp, input_names=("input_ids",)).simulate(input_ids=IDS)
    for name, expected in model(input_ids=IDS).items():
        assert found[name].dtype == expected.dtype
        assert relative_error(found[name].double(), expected.double()) < (1e-6 if name == "half" else 1e-9)


@torch.no_grad()
def test_a_length_that_is_folded_into_parts_is_a_multiple_in_the_examples() -> None:
    model = randomized(Folds(tiny_config("llama")).double().eval())
    assert trace(model, input_names=("input_ids", "input_values")).multiples == {"E": 4}
    compiled = adx.compile(model, tp=2, input_names=("input_ids", "input_values"))
    for samples in (20, 24):
        inputs = {"input_ids": IDS, "input_values": torch.rand(2, samples, dtype=torch.float64)}
        assert relative_error(compiled.simulate(**inputs).logits, model(**inputs)["logits"]) < 1e-9
