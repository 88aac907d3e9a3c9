"""A model in training is evaluated: outputs of evaluation mode, from the weights as they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import autodist_fx as adx
from tests.support.float64 import in_float64
from tests.support.models import relative_error, tiny_model
from tests.support.training.one_process import adamw, text

MESHES: tuple[dict[str, Any], ...] = (
    {"tp": 2, "dp": 2}, {"pp": 2, "schedule": "zbv_zero_bubble"},
)  # fmt: skip


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "-".join(map(str, mesh.values())))
def test_outputs_are_those_of_the_model(mesh: dict[str, Any]) -> None:
    with in_float64():
        layers = 4 if "schedule" in mesh else 1
        model = tiny_model("gpt2", n_layer=layers, attn_pdrop=0.3, resid_pdrop=0.2)
        engine = adx.train(model, simulate=True, optimizer=adamw, **{"microbatches": 2, **mesh})
        other = text(3, 7, 1)
        before = engine.evaluate(other)
        assert relative_error(before.logits, model(**other).logits) <= 1e-9
        engine.step(text(8, 9, 0))
        truth = copy.deepcopy(model)
        truth.load_state_dict(engine.gather().parameters, strict=False)
        for batch in (other, {"input_ids": other["input_ids"]}):
            got, wanted = engine.evaluate(batch), truth(**batch)
            assert relative_error(got.logits, wanted.logits) <= 1e-9
            assert (got.loss is None) == (wanted.loss is None) and not got.logits.requires_grad
            if wanted.loss is not None:
                assert torch.allclose(got.loss, wanted.loss, rtol=1e-9)
        assert not torch.allclose(before.logits, got.logits)
