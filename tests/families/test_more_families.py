"""Decoders whose layout, positions or cache differ from the usual: forward and decoding equal the model's own.

One family a mechanism. In float64, or float32 where the model itself overflows in float64 (its mask is float32).
"""

from __future__ import annotations

import inspect

import pytest
import torch

import autodist_fx as adx
from cost_model.plan.weights import sharded_share
from tests.support.generation.decoders import CASES, decoder
from tests.support.models import padded_batch, relative_error


@pytest.mark.one_for_each("case")
@pytest.mark.parametrize("mesh", [(3, 1), (2, 2)], ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_forward_and_decoding_equal_eager(case: str, mesh: tuple[int, int]) -> None:
    model, tolerance = decoder(case), CASES[case][3]
    ids, mask = padded_batch()
    if model(input_ids=ids, attention_mask=mask).logits.isnan().any():
        mask = torch.ones_like(ids)  # as bloom's in float64 where a row of its mask is all padding
    positions = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        positions["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    own = {name: value.clone() for name, value in positions.items()}  # some models add to their argument in place
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False, **own).logits
    kept = mask.bool()

    if mesh == (3, 1):
        names = ("input_ids", "attention_mask", *positions)
        compiled = adx.compile(model, tp=mesh[0], pp=mesh[1], input_names=names)
        got = compiled.simulate(input_ids=ids, attention_mask=mask, **positions).logits
        assert relative_error(got[kept], expected[kept]) <= tolerance
        assert sharded_share(compiled.plan) >= 0.9

    else:
        compiled = adx.compile(model, tp=mesh[0], pp=mesh[1], use_cache=True)
        cache, logits = None, []
        for start, stop in [(0, 5), *((at, at + 1) for at in range(5, ids.shape[1]))]:
            step = {name: value[:, start:stop] for name, value in {"input_ids": ids, **positions}.items()}
            output = compiled.simulate(**step, attention_mask=mask[:, :stop], past_key_values=cache)
            cache = output.past_key_values
            logits.append(output.logits)
        assert relative_error(torch.cat(logits, 1)[kept], expected[kept]) <= tolerance
