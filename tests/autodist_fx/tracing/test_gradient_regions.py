"""A region of a model without gradients (torch.no_grad) leads none through its graph, nor through ranks."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import autodist_fx as adx
from autodist_fx.tracing import trace
from tests.support.models import randomized, relative_error, tiny_config, tiny_model

IDS = torch.arange(3, 21).view(2, 9)


class Gated(LlamaForCausalLM):
    """Scales its last hidden states by a gate of its own logits, which is computed in `region`."""

    region: Any = torch.no_grad

    def forward(self, input_ids, labels=None, **keywords):
        hidden = self.model(input_ids, **keywords).last_hidden_state
        with self.region():
            gate = torch.sigmoid(self.lm_head(hidden).mean(-1, keepdim=True))
        logits = self.lm_head(hidden * gate)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class GatedWithGradients(Gated):
    region = contextlib.nullcontext


@pytest.mark.parametrize("cls", [Gated, GatedWithGradients])
def test_gradients_end_in_a_region_without_them(cls: type[Gated]) -> None:
    model = randomized(cls(tiny_config("llama", num_hidden_layers=1)).eval())
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    found = adx.compile(model, tp=2, train=True).gradients(IDS, labels=IDS)
    truth = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == truth.keys() and max(relative_error(found[n], g) for n, g in truth.items()) < 1e-6
    other = (GatedWithGradients if cls is Gated else Gated)(model.config).to(model.dtype).eval()
    other.load_state_dict(model.state_dict())
    other(IDS, labels=IDS, use_cache=False).loss.backward()
    assert relative_error(other.lm_head.weight.grad, truth["lm_head.weight"]) > 1e-3  # it makes a difference


def test_what_no_gradient_leads_through_stays_as_it_is() -> None:
    """Llama's rotary table is computed without gradients, of buffers and positions alone."""
    nodes = trace(tiny_model("llama", num_hidden_layers=1)).graph_module.graph.nodes
    assert not [node for node in nodes if node.target == "detach"]
