"""Decoders whose layout, positions or cache differ from the usual: forward and decoding equal the model's own.

One family a mechanism. In float64, or float32 where the model itself overflows in float64 (its mask is float32).
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import autodist_fx as adx
from cost_model.plan.weights import sharded_share
from tests.support.models import padded_batch, randomized, relative_error

_PLAIN = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 80}
_N = {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64}
_FALCON = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
_GEMMA = {
    **_PLAIN, "num_hidden_layers": 4, "num_key_value_heads": 3, "head_dim": 8, "sliding_window": 4,
    "query_pre_attn_scalar": 8,
}  # fmt: skip

# What is different -> (family, arguments of its config, dtype, relative tolerance)
CASES = {
    "a cache of tuples or a Cache": ("bert", {**_PLAIN, "is_decoder": True}, torch.float32, 1e-5),
    "a layer asks for the cache's length": ("roformer", {**_PLAIN, "is_decoder": True}, torch.float32, 1e-5),
    "tables kept as attributes": ("gptj", {**_N, "rotary_dim": 4}, torch.float64, 1e-6),
    "q, v, k fused per group": ("codegen", {**_N, "n_embd": 64, "n_head": 8, "rotary_dim": 4}, torch.float32, 1e-5),
    "alibi": ("bloom", {"hidden_size": 48, "n_layer": 2, "n_head": 6}, torch.float64, 1e-6),
    "alibi, q|k|v": ("mpt", {"d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 128}, torch.float32, 1e-5),
    "one KV head, fused": ("falcon", {**_FALCON, "multi_query": True}, torch.float64, 1e-6),
    "groups of q, k, v": (
        "falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, torch.float64, 1e-6
    ),
    "alibi, q, k, v per head": ("falcon", {**_FALCON, "alibi": True, "multi_query": False}, torch.float64, 1e-6),
    "partial rotary, q, k, v per head": ("gpt_neox", _PLAIN, torch.float64, 1e-6),
    "one KV head behind all queries": ("gpt_bigcode", {**_N, "multi_query": True}, torch.float64, 1e-6),
    "soft-capping, every other layer sliding": ("gemma2", _GEMMA, torch.float64, 1e-6),
    "norms of heads, two rotary tables": (
        "gemma3_text", {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2}, torch.float64, 1e-6
    ),
    "attention beside the MLP": ("cohere2", {**_PLAIN, "num_key_value_heads": 3}, torch.float64, 1e-6),
    "sinusoidal positions": (
        "xglm", {"d_model": 48, "attention_heads": 6, "num_layers": 2, "ffn_dim": 80}, torch.float32, 1e-5
    ),
    "a decoder without its encoder": (
        "bart", {"d_model": 48, "decoder_layers": 2, "decoder_attention_heads": 6, "decoder_ffn_dim": 80,
                 "is_decoder": True, "is_encoder_decoder": False}, torch.float64, 1e-6
    ),
}  # fmt: skip


def _model(family: str, arguments: dict[str, Any], dtype: torch.dtype) -> Any:
    config = AutoConfig.for_model(family, vocab_size=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, **arguments)
    return randomized(AutoModelForCausalLM.from_config(config).to(dtype).eval())


@pytest.mark.one_for_each("case")
@pytest.mark.parametrize("mesh", [(3, 1), (2, 2)], ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_forward_and_decoding_equal_eager(case: str, mesh: tuple[int, int]) -> None:
    family, arguments, dtype, tolerance = CASES[case]
    model = _model(family, arguments, dtype)
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
