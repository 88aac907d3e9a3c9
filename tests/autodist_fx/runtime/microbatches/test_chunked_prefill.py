"""A step of many tokens run in chunks over stages leaves the logits, the cache and the tokens of the whole step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import autodist_fx as adx
from cost_model.mesh import Mesh
from tests.support.models import padded_batch, relative_error, tiny_config, tiny_model
from tests.support.moe import experts_are_modules, tiny_moe_model
from tests.support.ranks import on_ranks

IDS, MASK = padded_batch(3, 13)


@pytest.mark.drawn(1)
@pytest.mark.parametrize(
    "make, tolerance",
    [
        (lambda: tiny_model("llama"), 1e-6),  # it computes norms in float32
        (lambda: tiny_model("gpt2"), 1e-9),
        (lambda: tiny_model("mistral", sliding_window=5), 1e-6),
        (lambda: tiny_moe_model("mixtral"), 1e-6),
    ],
    ids=["llama", "gpt2", "sliding windows", "mixtral"],
)
@torch.no_grad()
def test_chunks_leave_what_the_whole_step_leaves(make: Callable[[], PreTrainedModel], tolerance: float) -> None:
    model = make()
    first = model(input_ids=IDS[:, :9], attention_mask=MASK[:, :9], use_cache=True)
    second = model(input_ids=IDS[:, 9:], attention_mask=MASK, past_key_values=first.past_key_values)
    wanted = [first.logits[:, -1:], second.logits[:, -1:]]
    tokens = model.generate(IDS[1:2], do_sample=False, max_new_tokens=8, eos_token_id=None)

    def work(split: Any) -> Any:
        output = split(input_ids=IDS[:, :9], attention_mask=MASK[:, :9], use_cache=True, microbatches=4)
        found, counts = [output.logits], [split.in_flight.count]
        cache = output.past_key_values
        found.append(split(input_ids=IDS[:, 9:], attention_mask=MASK, past_key_values=cache, microbatches=2).logits)
        made = split.generate(IDS[1:2], do_sample=False, max_new_tokens=8, eos_token_id=None, microbatches=3)
        return found, counts, made, split.in_flight, split.program.whole_steps

    for rank, (found, counts, made, in_flight, whole) in enumerate(on_ranks(model, Mesh(pp=2), work)):
        assert torch.equal(made, tokens)
        if rank == 1:  # where logits are
            for one, truth in zip(found, wanted, strict=True):
                assert relative_error(one, truth) <= tolerance
        if not experts_are_modules(model):  # 4.57's pick rows of all tokens
            assert whole == "" and counts == [4], (whole, counts)
            assert rank == 0 or in_flight.count == 3


def why_whole(family: str, **changes: Any) -> str:
    compiled = adx.compile(tiny_config(family, **changes), pp=2, use_cache=True, verify=False)
    return compiled.program(0).whole_steps


def test_what_looks_at_several_tokens_is_run_whole() -> None:
    """Frequencies that the greatest position decides; attention that is not masked by places."""
    scaled = {"rope_type": "dynamic", "factor": 2.0}
    assert "several tokens" in why_whole("llama", rope_scaling=scaled)
    assert why_whole("bloom") != ""
