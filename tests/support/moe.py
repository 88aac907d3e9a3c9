"""Tiny mixture-of-experts models: `tiny_models.tiny_model`, with the sizes that such configs have."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.dbrx.configuration_dbrx import DbrxAttentionConfig, DbrxFFNConfig

from autodist_fx.api.compiled_model import CompiledModel
from tests.support.models import tiny_model

# Set where the family's config knows the name. Routed experts: 5, which no mesh divides; 2 for each token.
SIZES: dict[str, Any] = {
    "num_experts": 5, "num_local_experts": 5, "n_routed_experts": 5, "moe_num_experts": 5, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_topk": 2, "moe_intermediate_size": 20, "intermediate_size": 44, "n_shared_experts": 1,
    "shared_expert_intermediate_size": 36, "shared_intermediate_size": 36, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 0, "decoder_sparse_step": 1, "moe_layer_start_index": 0, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "qk_head_dim": 16, "v_head_dim": 8,
}  # fmt: skip
_LATENT = {"head_dim": 8, "num_key_value_heads": 6}
FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "deepseek_v2": _LATENT, "deepseek_v3": _LATENT, "longcat_flash": _LATENT,
}  # fmt: skip

FOUR = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)


def dbrx_experts(count: int) -> dict[str, Any]:
    """Which DBRX's config has in a config of their own."""
    experts = DbrxFFNConfig(ffn_hidden_size=44, moe_num_experts=count, moe_top_k=2)
    experts.hidden_size = 48  # transformers 4 takes the model's, which is as much
    return {"ffn_config": experts, "attn_config": DbrxAttentionConfig(clip_qkv=8.0, rope_theta=10000.0)}


def tiny_moe_model(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    sizes = dbrx_experts(4) if family == "dbrx" else FAMILY_SIZES.get(family, {})
    return tiny_model(family, dtype, **{**SIZES, **sizes, **changes})


def experts_are_modules(model: PreTrainedModel) -> bool:
    """Whether each expert is a module with weights of its own (most of transformers 4's), and no part of a weight."""
    return any(re.search(r"\.experts\.\d+\.", name) for name, _ in model.named_parameters())


def skip_one_node(compiled: CompiledModel) -> None:
    """Skip a test of the nodes of single experts where a layer of them is one node (test_routed_experts.py)."""
    if any(op.kind == "experts" for op in compiled.plan.ops):
        pytest.skip("a layer of experts is one node")
