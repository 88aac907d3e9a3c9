"""Tiny models of the families that people generate with today, random in every parameter, and prompts for them.

Heads that two ranks cannot share evenly wherever the family lets us; each kind of layer that the family has.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.support.models import randomized
from tests.support.seq2seq import seq2seq_inputs, tiny_seq2seq

BATCH = torch.tensor([[9, 10, 11, 12, 13], [0, 0, 14, 15, 16]])  # the second prompt is padded on the left
MASK = (BATCH != 0).long()
_TEXT: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 31, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
# widths of experts: multiples of 16 bytes, which grouped products on a CPU want
_EXPERTS: dict[str, Any] = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 6, "linear_value_head_dim": 8,
}  # fmt: skip
_DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "qwen3_5_text": _LINEAR,
    "gemma3_text": {**_SLIDING, "query_pre_attn_scalar": 8},
    # the last two layers read the keys of those before; heads of full attention are wider
    "gemma4_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 4, "global_head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": 61,
        "hidden_size_per_layer_input": 6,
    },
    "gpt_oss": {**_SLIDING, "intermediate_size": 12, "num_local_experts": 3, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "num_key_value_heads": 6, "head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
        "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 12,
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
    },
    "mixtral": {"intermediate_size": 12, "num_local_experts": 3, "num_experts_per_tok": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {**_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 12},
    "mamba2": {"num_heads": 6, "head_dim": 8, "state_size": 7, "n_groups": 2, "chunk_size": 4, "expand": 2},
}  # fmt: skip
_SEQ2SEQ = ("t5", "whisper")
FAMILIES = (*(family for family in _DECODERS if family in CONFIG_MAPPING), *_SEQ2SEQ)


def tiny(family: str) -> PreTrainedModel:
    """Return a model in eval mode; its weights are wide enough for a token to depend on all before it."""
    if family in _SEQ2SEQ:
        model = tiny_seq2seq(family, torch.float32, layers=1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 2.0 if parameter.dim() > 1 else 1.0
        return model
    config = AutoConfig.for_model(family, **{**_TEXT, **_DECODERS[family]})
    return randomized(AutoModelForCausalLM.from_config(config).float().eval())


def prompt(model: Any) -> dict[str, torch.Tensor]:
    """Return what `generate` of a model, or of a rank's, is given: token ids of two rows, or spectrograms."""
    if model.main_input_name == "input_features":
        return {"input_features": seq2seq_inputs(model)["input_features"]}
    return {"input_ids": BATCH, "attention_mask": MASK}
