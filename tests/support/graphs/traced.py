"""Tiny models of the families that are traced, and their graphs with real weights."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from autodist_fx.tracing import TracedModel
from tests.support.models import set_rotary

TINY = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "n_embd": 64, "n_layer": 2, "n_head": 4, "ffn_dim": 128,
    "word_embed_proj_dim": 64, "max_position_embeddings": 128, "sliding_window": 5,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = [
    "llama", "qwen2", "gpt2", "opt", "mistral", "qwen3", "phi3", "phi", "gpt_neox", "bloom", "falcon", "gemma2",
]  # fmt: skip


def tiny_config(model_type: str, **changes: object) -> PretrainedConfig:
    config = AutoConfig.for_model(model_type)
    for name, value in {**TINY, **changes}.items():
        read_only = isinstance(getattr(type(config), name, None), property)  # falcon's head_dim
        off = name == "sliding_window" and getattr(config, name, None) is None  # qwen2's and phi3's: left off
        if not set_rotary(config, name, value) and hasattr(config, name) and not read_only and not off:
            setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


def tiny_model(model_type: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, **changes)).eval()


def with_weights(traced: TracedModel, model: PreTrainedModel) -> torch.fx.GraphModule:
    missing = traced.graph_module.load_state_dict(model.state_dict(), strict=False, assign=True).missing_keys
    assert not missing
    return traced.graph_module


def padded_batch(batch: int, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and a mask, the first sequence padded on the left. (Eager takes another kernel where nothing is.)"""
    generator = torch.Generator().manual_seed(seq)
    ids = torch.randint(3, 250, (batch, seq), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return ids, mask
