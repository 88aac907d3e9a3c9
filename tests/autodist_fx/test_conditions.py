"""Conditions on lengths: decided once while tracing, and asked again at every call."""

import warnings

import pytest
import torch
from tiny_models import relative_error, tiny_config
from transformers import LlamaForCausalLM

import autodist_fx as adx


class Doubling(LlamaForCausalLM):
    """Takes another way where there are few tokens."""

    def forward(self, input_ids=None, attention_mask=None, **keywords):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **keywords)
        if input_ids.shape[1] < 6:
            output.logits = output.logits * 2
        return output


class DoublingByPosition(LlamaForCausalLM):
    """The same, by a tensor that holds a length."""

    def forward(self, input_ids=None, attention_mask=None, **keywords):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **keywords)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        if positions[-1] + 1 < 6:
            output.logits = output.logits * 2
        return output


@pytest.mark.parametrize("kind", [Doubling, DoublingByPosition])
@torch.no_grad()
def test_lengths_that_go_another_way_are_warned_of(kind: type[LlamaForCausalLM]) -> None:
    torch.manual_seed(0)
    model = kind(tiny_config("llama")).double().eval()
    compiled = adx.compile(model, tp=2)
    long, short = torch.arange(3, 15).view(2, 6), torch.arange(3, 13).view(2, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative_error(compiled.simulate(input_ids=long).logits, model(input_ids=long).logits) <= 1e-6
    with pytest.warns(UserWarning, match=r"goes another way at test_conditions.py:\d+ .* the condition was False"):
        compiled.simulate(input_ids=short)
