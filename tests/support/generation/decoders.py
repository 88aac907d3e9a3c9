"""Tiny decoders whose layout, positions or cache differ from the usual, one family a mechanism.

In float64, or float32 where the model itself overflows in float64 (its mask is float32).
"""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.support.models import randomized

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


def decoder(case: str) -> PreTrainedModel:
    """In eval mode, random numbers in every parameter."""
    family, arguments, dtype, _ = CASES[case]
    config = AutoConfig.for_model(family, vocab_size=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, **arguments)
    return randomized(AutoModelForCausalLM.from_config(config).to(dtype).eval())
