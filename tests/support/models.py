"""Tiny models of every family, with random numbers in *every* parameter.

Transformers starts biases at 0 and norm scales at 1: a bias added twice, or a scale applied to the wrong rows, would
give the right result.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

# The smallest relative error that can be asked for. Llama-like models compute their norms and rotary tables in float32
# whatever the model's dtype, so that a last bit of float64 can become a last bit of float32 (6e-8).
CASTS_TO_FLOAT32 = {
    "llama": True, "qwen2": True, "gpt2": False, "opt": False, "mistral": True, "qwen3": True, "phi3": True,
}  # fmt: skip
FAMILIES = tuple(CASTS_TO_FLOAT32)

_TINY = {
    "vocab_size": 128, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 8, "n_embd": 48, "n_layer": 2, "n_head": 6, "ffn_dim": 80,
    "word_embed_proj_dim": 48, "max_position_embeddings": 64, "n_positions": 64, "sliding_window": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def relative_tolerance(family: str) -> float:
    """Returns the tolerance in float64: 1e-9, or 1e-6 where the model itself casts to float32."""
    return 1e-6 if CASTS_TO_FLOAT32[family] else 1e-9


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """A config of two layers. Only what the family knows is set: the same `changes` may be given to several."""
    config = AutoConfig.for_model(family)
    for name, value in {**_TINY, **changes}.items():
        off = name == "sliding_window" and getattr(config, name, None) is None  # qwen2's and phi3's: left off
        if not set_rotary(config, name, value) and hasattr(config, name) and not off:
            setattr(config, name, value)
    computed = isinstance(getattr(type(config), "layer_types", None), property)
    if not computed and getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


def set_rotary(config: PretrainedConfig, name: str, value: Any) -> bool:
    """Set rope_scaling or rope_theta where a config has them in one dict (transformers 5); False for anything else."""
    if name not in ("rope_scaling", "rope_theta") or not hasattr(config, "rope_parameters"):
        return False
    config.rope_parameters |= value if name == "rope_scaling" else {name: value}
    return True


def tiny_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """In eval mode. Every parameter is random, none too large for the softmaxes to stay soft."""
    return randomized(AutoModelForCausalLM.from_config(tiny_config(family, **changes)).to(dtype).eval(), seed)


def randomized(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The model itself, with random numbers in every parameter. Where its experts can be computed in several ways, they
    are computed in the one that knows float64."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                value = noise * parameter.shape[-1] ** -0.5
            else:
                value = noise * 0.3 + (1.0 if name.endswith("weight") else 0.0)  # a norm's scale, or a bias
            parameter.copy_(value)
    return model


def padded_batch(batch: int = 2, seq: int = 9, vocab: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and an attention mask; the first sequence is padded on the left by two."""
    ids = torch.randint(3, vocab, (batch, seq), generator=torch.Generator().manual_seed(seq))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return ids, mask


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, over the largest value of `b`; infinite where either has a NaN."""
    difference = (a - b).abs().max() / b.abs().max()
    return float("inf") if bool(difference.isnan()) else float(difference)


def census(graph_module: torch.fx.GraphModule) -> dict[str, int]:
    """How many of each comm op there are."""
    found: dict[str, int] = {}
    for node in graph_module.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and name in ("all_reduce", "all_gather", "send", "recv"):
            found[name] = found.get(name, 0) + 1
    return found
