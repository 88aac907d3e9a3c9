"""float16 and bfloat16: what the ranks round differently is no more than what the model itself rounds away."""

from __future__ import annotations

import copy

import pytest
import torch

import autodist_fx as adx
from tests.support.models import padded_batch, tiny_model


@pytest.mark.drawn(3)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("family, mesh", [("llama", (2, 2)), ("gpt2", (3, 1))])
@torch.no_grad()
def test_no_further_from_the_truth_than_the_model_itself(
    family: str, mesh: tuple[int, int], dtype: torch.dtype, attention: str
) -> None:
    model = tiny_model(family, dtype=dtype)
    model.set_attn_implementation(attention)
    ids, mask = padded_batch(2, 9)
    mask[:] = 1
    labels = ids.clone()
    truth = copy.deepcopy(model).double()(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
    eager = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
    found = adx.compile(model, tp=mesh[0], pp=mesh[1]).simulate(input_ids=ids, attention_mask=mask, labels=labels)
    assert found.logits.dtype == dtype and found.loss.dtype == eager.loss.dtype
    own_error = (eager.logits - truth.logits).norm()
    assert own_error > 0 and (found.logits - truth.logits).norm() <= 1.5 * own_error
    one_step = torch.finfo(dtype).eps
    assert abs(found.loss - truth.loss) <= 2 * abs(eager.loss - truth.loss) + one_step * truth.loss
