"""Mixtures of experts on every mesh give what the model gives on one device, whichever experts the tokens go to.

In a world without float32 (in_float64), to 1e-9: all of these families cast inside. One test leaves them their casts.
"""

from __future__ import annotations

import functools
import inspect
import math

import pytest
import torch
from transformers import PreTrainedModel

import autodist_fx as adx
from autodist_fx.api.compiled_model import CompiledModel
from tests.support.float64 import in_float64
from tests.support.models import padded_batch, relative_error
from tests.support.moe import tiny_moe_model

MESHES = ((2, 1), (4, 1), (1, 2), (2, 2))
# One of each way to write it: loops over hit experts (Mixtral, Qwen3), over all (DeepSeek: shared experts, groups),
# over parts of one weight (DBRX), rows sorted by expert (Granite), runs of rows between counts (DeepSeek-V2),
# all tokens to all experts (GPT-OSS, and Llama-4 in the rows' own dim), a router with a backward of its own (Phi-MoE).
FAMILIES = (
    "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "dbrx", "granitemoe", "gpt_oss", "llama4_text", "phimoe",
)  # fmt: skip
TOLERANCE = 1e-9
# DeepSeek-V3 adds float32 and the model's dtype up, in the model itself: with its casts, no other dtype runs, and all
# that is computed has an error of float32.
FLOAT32 = ("deepseek_v3",)


@functools.cache
def _model(family: str) -> PreTrainedModel:
    with in_float64():
        return tiny_moe_model(family)


def _sharded(compiled: CompiledModel) -> float:
    """The share of matmuls' weights that no rank holds all of."""
    weights = [p for p in compiled.plan.params if p.matmul]
    return sum(math.prod(p.shape) for p in weights if p.placement.is_shard) / sum(math.prod(p.shape) for p in weights)


@pytest.mark.one_for_each("family")
@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
@in_float64()
def test_forward_equals_eager(family: str, mesh: tuple[int, int]) -> None:
    model, (ids, mask) = _model(family), padded_batch()
    compiled = adx.compile(model, tp=mesh[0], pp=mesh[1])
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert relative_error(compiled.simulate(input_ids=ids, attention_mask=mask).logits, expected) <= TOLERANCE
    if mesh[0] > 1:
        assert _sharded(compiled) >= 0.9


@pytest.mark.drawn(3)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_with_the_models_own_casts(family: str) -> None:
    """A last bit of float64 becomes one of float32 (6e-8) where norms, softmaxes and rotary tables are computed."""
    model = tiny_moe_model(family, torch.float32 if family in FLOAT32 else torch.float64)
    ids, mask = padded_batch()
    compiled = adx.compile(model, tp=2, pp=2)
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    found = compiled.simulate(input_ids=ids, attention_mask=mask).logits
    assert relative_error(found, expected) <= (1e-5 if family in FLOAT32 else 1e-6)


@pytest.mark.drawn(4)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
@in_float64()
def test_decoding_equals_eager(family: str) -> None:
    """One token a sequence goes to two of five experts: on most steps some expert has nothing to do."""
    model, (ids, mask) = _model(family), padded_batch()
    compiled = adx.compile(model, tp=2, pp=1, use_cache=True)
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    if "position_ids" not in inspect.signature(model.forward).parameters:
        positions = {}
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False, **positions).logits
    cache, logits = None, []
    for start, stop in [(0, 5), *((at, at + 1) for at in range(5, ids.shape[1]))]:
        own = {name: value[:, start:stop] for name, value in positions.items()}
        step = compiled.simulate(
            input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, **own
        )
        cache = step.past_key_values
        logits.append(step.logits)
    kept = mask.bool()
    assert relative_error(torch.cat(logits, 1)[kept], expected[kept]) <= TOLERANCE


@pytest.mark.parametrize("original", [7, 16])
@torch.no_grad()
@in_float64()
def test_rotary_frequencies_for_long_inputs(original: int) -> None:
    """As Phi-3.5-MoE has them: other ones beyond the original length, which is told by a tensor that holds a length."""
    factors = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    scales = {"short_mscale": 1.1, "long_mscale": 1.3, "factor": 2.0, "original_max_position_embeddings": original}
    model = tiny_moe_model("phimoe", rope_scaling={"type": "longrope", "rope_type": "longrope", **factors, **scales})
    model.config.original_max_position_embeddings = original  # as in the released config, and in no other's defaults
    compiled, (ids, _) = adx.compile(model, tp=2, pp=2, use_cache=True), padded_batch()
    cache, ours = None, None
    for start, stop in ((0, 5), (5, 8), (8, 9)):
        known = {"input_ids": ids[:, start:stop], "attention_mask": torch.ones(2, stop, dtype=torch.long)}
        step = model(**known, past_key_values=cache, use_cache=True)
        positions = torch.arange(start, stop).expand(2, -1)
        own = compiled.simulate(**known, past_key_values=ours, position_ids=positions)
        cache, ours = step.past_key_values, own.past_key_values
        assert relative_error(own.logits, step.logits) <= TOLERANCE


@torch.no_grad()
@in_float64()
def test_experts_without_a_token_and_one_with_all() -> None:
    """Routers that send every token to the same two experts."""
    model, (ids, mask) = tiny_moe_model("mixtral"), padded_batch()
    for name, weight in model.named_parameters():
        if name.endswith(".gate.weight"):
            weight.zero_()  # all scores are equal: topk takes the same for all tokens
    compiled = adx.compile(model, tp=2, pp=2)
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert relative_error(compiled.simulate(input_ids=ids, attention_mask=mask).logits, expected) <= TOLERANCE


@pytest.mark.parametrize("family", ["mixtral", "dbrx", "granitemoe"])
@in_float64()
def test_the_router_is_whole_and_a_layer_of_experts_costs_one_all_reduce(family: str) -> None:
    compiled = adx.compile(_model(family), tp=2, pp=1)
    routers = [p for p in compiled.plan.params if "gate.weight" in p.name or "router" in p.name]
    assert len(routers) == 2 and all(p.placement.is_replicate for p in routers)
    reduced = [op for op in compiled.plan.ops for placement, gather in zip(op.outputs, op.gather, strict=True)
               if gather and placement.is_partial]  # fmt: skip
    assert len(reduced) <= 4  # two layers, each attention and experts; not one for each expert
