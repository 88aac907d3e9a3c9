"""Decoders whose layout, positions or cache differ from the usual: forward and decoding equal the model's own.

One family a mechanism. In float64, or float32 where the model itself overflows in float64 (its mask is float32).
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from tiny_models import padded_batch, relative_error, tiny_model

import autodist_fx as adx
from cost_model.explain import sharded_share

# What the config's arguments are called in these families, beside the usual names.
_SMALL = {
    "hidden_size": 48, "n_embed": 48, "d_model": 48, "n_heads": 6, "n_layers": 2, "num_layers": 2, "num_heads": 6,
    "attention_heads": 6, "n_ctx": 64, "rotary_dim": 4, "n_inner": 80, "n_positions": 64, "decoder_layers": 2,
    "decoder_attention_heads": 6, "decoder_ffn_dim": 80, "encoder_layers": 1, "max_seq_len": 64, "seq_length": 64,
    "hidden_size_per_layer_input": 8, "type_vocab_size": 2, "query_pre_attn_scalar": 8,
}  # fmt: skip

# (family, changes of its config, dtype, relative tolerance)
CASES = {
    "absolute positions, a cache of tuples or a Cache": ("bert", {"is_decoder": True}, torch.float32, 1e-5),
    "per-layer caches that are asked for their own length": ("roformer", {"is_decoder": True}, torch.float32, 1e-5),
    "tables kept as plain attributes": ("gptj", {"n_head": 6, "n_embd": 48}, torch.float64, 1e-6),
    "q, v and k fused per group": ("codegen", {"n_head": 8, "n_embd": 64}, torch.float32, 1e-5),
    "alibi": ("bloom", {"n_head": 6}, torch.float64, 1e-6),
    "alibi and one fused weight": ("mpt", {}, torch.float64, 1e-6),
    "rotary, one KV head": ("falcon", {"multi_query": True, "new_decoder_architecture": False}, torch.float64, 1e-6),
    "groups of q, k, v": (
        "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}, torch.float64, 1e-6
    ),
    "alibi, q, k, v per head": ("falcon", {"alibi": True, "multi_query": False}, torch.float64, 1e-6),
    "q, k, v per head, partial rotary": ("gpt_neox", {}, torch.float64, 1e-6),
    "many query heads and one KV head in one weight": ("gpt_bigcode", {"multi_query": True}, torch.float64, 1e-6),
    "soft-capping, sliding windows between": ("gemma2", {}, torch.float64, 1e-6),
    "norms of heads, two rotary tables": ("gemma3_text", {}, torch.float64, 1e-6),
    "attention and MLP side by side": ("cohere2", {}, torch.float64, 1e-6),
    "sinusoidal positions": ("xglm", {"attention_heads": 6, "num_layers": 2}, torch.float64, 1e-6),
    "a decoder of two": ("bart", {"is_decoder": True, "is_encoder_decoder": False}, torch.float64, 1e-6),
}  # fmt: skip


def _model(family: str, changes: dict[str, Any], dtype: torch.dtype) -> Any:
    return tiny_model(family, dtype, **{**_SMALL, **changes})


@pytest.mark.parametrize("mesh", [(2, 1), (3, 1), (2, 2)], ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_forward_and_decoding_equal_eager(case: str, mesh: tuple[int, int]) -> None:
    family, changes, dtype, tolerance = CASES[case]
    model = _model(family, changes, dtype)
    ids, mask = padded_batch()
    positions = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        positions["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False, **positions).logits
    kept = mask.bool()

    if mesh != (2, 2):
        names = ("input_ids", "attention_mask", *positions)
        compiled = adx.compile(model, tp=mesh[0], pp=mesh[1], input_names=names)
        got = compiled.simulate(input_ids=ids, attention_mask=mask, **positions).logits
        assert relative_error(got[kept], expected[kept]) <= tolerance
        assert sharded_share(compiled.plan) >= 0.9

    if mesh != (3, 1):
        compiled = adx.compile(model, tp=mesh[0], pp=mesh[1], use_cache=True)
        cache, logits = None, []
        for start, stop in [(0, 5), *((at, at + 1) for at in range(5, ids.shape[1]))]:
            step = {name: value[:, start:stop] for name, value in {"input_ids": ids, **positions}.items()}
            output = compiled.simulate(**step, attention_mask=mask[:, :stop], past_key_values=cache)
            cache = output.past_key_values
            logits.append(output.logits)
        assert relative_error(torch.cat(logits, 1)[kept], expected[kept]) <= tolerance
