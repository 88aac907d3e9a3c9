"""Models that add layers to their cache while they run, one for each further run of a layer, say."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

import autodist_fx as adx
from autodist_fx.calls.cache_names import CACHE_FIELD
from tests.support.models import randomized, relative_error, tiny_config

IDS = torch.arange(3, 21).view(2, 9)


class Summing(LlamaForCausalLM):
    """Adds up its logits of all tokens so far, kept in two cache layers of its own, the last of which it writes
    first."""

    def forward(self, input_ids=None, past_key_values=None, cache=None, **keywords):
        past_key_values = past_key_values if cache is None else cache
        own = self.config.num_hidden_layers
        if past_key_values is not None and len(past_key_values.layers) == own:
            past_key_values.layers += [copy.deepcopy(past_key_values.layers[0]) for _ in range(2)]
        output = super().forward(input_ids=input_ids, past_key_values=past_key_values, **keywords)
        for layer in (own + 1, own):
            kept = output.logits[:, None] * (layer + 1)
            if past_key_values is not None:
                kept, _ = past_key_values.update(kept, kept, layer)
            output.logits = output.logits + kept.sum(2)
        return output


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
@torch.no_grad()
def test_layers_that_a_model_adds_are_layers_of_the_split_cache(tp: int, pp: int) -> None:
    model = randomized(Summing(tiny_config("llama")).double().eval())
    compiled = adx.compile(model, tp=tp, pp=pp, use_cache=True)
    cache, own = None, DynamicCache(config=model.config)
    for start, stop in ((0, 6), (6, 7), (7, 9)):
        step = compiled.simulate(input_ids=IDS[:, start:stop], past_key_values=cache)
        cache = step.past_key_values
        expected = model(input_ids=IDS[:, start:stop], **{CACHE_FIELD: own}, use_cache=True).logits
        assert relative_error(step.logits, expected) < 1e-9
