"""Tiny state-space and hybrid models."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_TINY = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_MAMBA_1 = {"num_hidden_layers": 2, "state_size": 5, "time_step_rank": 3, "hidden_size": 48, "vocab_size": 101}
_MAMBA_2 = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 7, "mamba_n_groups": 2, "mamba_chunk_size": 4}
_ZAMBA = {
    **_TINY, "mamba_d_state": 5, "num_key_value_heads": 6, "attention_hidden_size": 96, "attention_head_dim": 16,
}  # fmt: skip
# chunk sizes that the sequence is longer than, and does not divide
CONFIGS: dict[str, dict[str, Any]] = {
    "mamba": _MAMBA_1,
    "falcon_mamba": _MAMBA_1,
    "mamba2": {
        "num_hidden_layers": 2, "vocab_size": 101, "hidden_size": 48, "num_heads": 6, "head_dim": 16, "state_size": 7,
        "n_groups": 2, "chunk_size": 4,
    },
    "bamba": {**_TINY, **_MAMBA_2, "attn_layer_indices": [1]},
    "falcon_h1": {**_TINY, **_MAMBA_2, "mamba_d_ssm": 96},
    "granitemoehybrid": {
        **_TINY, **_MAMBA_2, "layer_types": ["mamba", "attention"], "num_local_experts": 0,
        "shared_intermediate_size": 80,
    },
    "zamba": {
        **_ZAMBA, "num_hidden_layers": 6, "mamba_dt_rank": 3,
        "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        **_ZAMBA, "n_mamba_heads": 6, "mamba_ngroups": 2, "chunk_size": 4, "num_mem_blocks": 1, "mamba_headdim": 16,
        "layers_block_type": ["mamba", "hybrid"], "adapter_rank": 4,
    },
    "recurrent_gemma": {**_TINY, "num_hidden_layers": 3, "lru_width": 48, "attention_window_size": 12,
                        "num_key_value_heads": 1},
    "rwkv": {"num_hidden_layers": 2, "vocab_size": 101, "hidden_size": 48, "attention_hidden_size": 48,
             "context_length": 64},
    "lfm2": {**_TINY, "layer_types": ["conv", "full_attention"]},
}  # fmt: skip


def state_space_model(family: str, **changes: Any) -> PreTrainedModel:
    """In float64, every parameter random."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**CONFIGS[family], **changes})
    model = AutoModelForCausalLM.from_config(config).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise * 0.2)
    return model
