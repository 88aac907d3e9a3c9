"""Encoders of any size on any mesh: what test_property.py shows of decoders. ADX_PROPERTY_EXAMPLES as there."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForMaskedLM

import autodist_fx as adx
from tests.support.graphs.random_models import random_costs
from tests.support.graphs.small import FREE
from tests.support.models import padded_batch, randomized, relative_error
from tests.support.random_configs import MESHES

EXAMPLES = int(os.environ.get("ADX_PROPERTY_EXAMPLES", "12"))
# Layers of their own; one layer's weights used by all; positions that count from the padding; two widths.
FAMILIES = ("bert", "albert", "roberta", "electra")


@st.composite
def fields(draw: st.DrawFn, family: str) -> dict[str, Any]:
    heads = draw(st.integers(1, 7))
    hidden = heads * draw(st.integers(1, 6))
    found = {
        "hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": draw(st.integers(1, 3)),
        "intermediate_size": draw(st.integers(1, 40)), "vocab_size": draw(st.integers(5, 60)),
        "tie_word_embeddings": draw(st.booleans()), "max_position_embeddings": 128, "pad_token_id": 0,
    }  # fmt: skip
    if family in ("albert", "electra"):
        found["embedding_size"] = draw(st.integers(1, 20))
    return found


@pytest.mark.drawn(2)
@pytest.mark.parametrize("family", FAMILIES)
@settings(
    max_examples=-(-EXAMPLES // 12), phases=(Phase.explicit, Phase.generate), suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
@torch.no_grad()
def test_any_encoder_on_any_mesh(family: str, data: st.DataObject) -> None:
    config = AutoConfig.for_model(family, **data.draw(fields(family), "config"))
    tp, pp = data.draw(st.sampled_from([m for m in MESHES if m[1] <= 2]), "mesh")
    model = randomized(AutoModelForMaskedLM.from_config(config).to(torch.float64).eval())
    ids, mask = padded_batch(2, 7, config.vocab_size)
    mask = mask.flip(1)
    plan_seed = data.draw(st.sampled_from([None, *range(100)]), "plan_seed")
    if plan_seed is None:
        compiled = adx.compile(model, tp=tp, pp=pp, hardware=FREE)
    else:
        with random_costs(plan_seed):
            compiled = adx.compile(model, tp=tp, pp=pp)
    expected = model(input_ids=ids, attention_mask=mask).logits
    with random_costs(plan_seed or 0):  # these inputs may be a variant of their own
        found = compiled.simulate(input_ids=ids, attention_mask=mask).logits
    assert relative_error(found, expected) <= 1e-9
