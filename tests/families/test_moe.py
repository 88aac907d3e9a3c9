"""Mixtures of experts on every mesh give what the model gives on one device, whichever experts the tokens go to."""

from __future__ import annotations

import functools
import inspect
import math

import pytest
import torch
from tiny_models import padded_batch, relative_error
from tiny_moe import tiny_moe_model
from transformers import PreTrainedModel

import autodist_fx as adx
from autodist_fx.compiled import CompiledModel

MESHES = ((2, 1), (4, 1), (1, 2), (2, 2))
# One of each way to write it: loops over hit experts (Mixtral, Qwen3), over all (DeepSeek: shared experts, groups),
# over parts of one weight (DBRX), rows sorted by expert (Granite), runs of rows between counts (DeepSeek-V2),
# all tokens to all experts (GPT-OSS).
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "dbrx", "granitemoe", "gpt_oss")

FLOAT32 = ("deepseek_v3",)  # its eager forward adds float32 and the model's dtype up: no other dtype runs


@functools.cache
def _model(family: str) -> PreTrainedModel:
    return tiny_moe_model(family, torch.float32 if family in FLOAT32 else torch.float64)


def _tolerance(family: str) -> float:
    return 1e-5 if family in FLOAT32 else 1e-6


def _sharded(compiled: CompiledModel) -> float:
    """The share of matmuls' weights that no rank holds all of."""
    weights = [p for p in compiled.plan.params if p.matmul]
    return sum(math.prod(p.shape) for p in weights if p.placement.is_shard) / sum(math.prod(p.shape) for p in weights)


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_forward_equals_eager(family: str, mesh: tuple[int, int]) -> None:
    model, (ids, mask) = _model(family), padded_batch()
    compiled = adx.compile(model, tp=mesh[0], pp=mesh[1])
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert relative_error(compiled.simulate(input_ids=ids, attention_mask=mask).logits, expected) <= _tolerance(family)
    if mesh[0] > 1:
        assert _sharded(compiled) >= 0.9


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
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
    assert relative_error(torch.cat(logits, 1)[kept], expected[kept]) <= _tolerance(family)


@torch.no_grad()
def test_experts_without_a_token_and_one_with_all() -> None:
    """Routers that send every token to the same two experts."""
    model, (ids, mask) = tiny_moe_model("mixtral"), padded_batch()
    for layer in model.model.layers:
        layer.block_sparse_moe.gate.weight.zero_()  # all scores are equal: topk takes the same for all tokens
    compiled = adx.compile(model, tp=2, pp=2)
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert relative_error(compiled.simulate(input_ids=ids, attention_mask=mask).logits, expected) <= 1e-6


@pytest.mark.parametrize("family", ["mixtral", "dbrx", "granitemoe"])
def test_the_router_is_whole_and_a_layer_of_experts_costs_one_all_reduce(family: str) -> None:
    compiled = adx.compile(_model(family), tp=2, pp=1)
    routers = [p for p in compiled.plan.params if "gate.weight" in p.name or "router" in p.name]
    assert len(routers) == 2 and all(p.placement.is_replicate for p in routers)
    reduced = [op for op in compiled.plan.ops for placement, gather in zip(op.outputs, op.gather, strict=True)
               if gather and placement.is_partial]  # fmt: skip
    assert len(reduced) <= 4  # two layers, each attention and experts; not one for each expert
