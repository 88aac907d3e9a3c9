"""What the shrinking by names cannot know of a type: benchmark input, with the reason where it is odd."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

_LATENT = {"head_dim": 4, "num_key_value_heads": 4}
_BLT_PART = {"vocab_size": 100, "num_hidden_layers": 1}

# Task, model type, or "task:model type" -> arguments of the config; a mapping under a sub-config's name goes into it.
OVERRIDES: dict[str, dict[str, Any]] = {
    "causal-lm": {"is_decoder": True},  # without it BERT and its kin look at later tokens, too
    "blt": {
        "encoder_hash_byte_group_size": [2, 3], "encoder_hash_byte_group_vocab": 64, "patch_in_forward": False,
        "encoder_config": {**_BLT_PART, "hidden_size_global": 64}, "global_config": {"hidden_size": 64},
        "decoder_config": {**_BLT_PART, "hidden_size_global": 64}, "patcher_config": {},
    },
    "cpmant": {"prompt_types": 4, "prompt_length": 4, "segment_types": 4, "position_bias_num_buckets": 16},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2}, "ffn_config": {"ffn_hidden_size": 56, "moe_num_experts": 4, "moe_top_k": 2},
    },
    # latent attention: as many KV heads as heads, and head_dim is the rotary part of a head
    "deepseek_v2": _LATENT, "deepseek_v3": _LATENT, "longcat_flash": _LATENT,
    # the first layers write the keys that the last ones read
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "got_ocr2": {"vision_config": {"output_channels": 16, "global_attn_indexes": [0], "window_size": 2}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    # an attention layer and a Mamba layer, with and without experts
    "jamba": {
        "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0,
    },
    "mamba2": {"num_heads": 8, "n_groups": 2, "chunk_size": 8},
    "mllama_text_model": {
        "cross_attention_layers": [1], "num_hidden_layers": 3, "rope_scaling": {"rope_type": "default"},
    },
    "phi4_multimodal": {
        "audio_config": {"num_blocks": 1, "nemo_conv_channels": 16, "ext_pw_out_channel": 32, "input_size": 16,
                         "depthwise_separable_out_channel": 32},
        "vision_config": {"crop_size": 32},
    },
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},  # the third layer is the one with attention
    "reformer": {
        "attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [12, 20],
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2, "num_hashes": 1, "hash_seed": 0,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 20, "pronunciation_embed_dim": 16, "shape_vocab_size": 20, "shape_embed_dim": 16,
    },
    "transfo-xl": {"cutoffs": [20, 50], "div_val": 1, "mem_len": 8},
    "xlstm": {
        "hidden_size": 128, "embedding_dim": 128, "num_blocks": 2, "chunk_size": 8, "ffn_round_up_to_multiple_of": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"use_mamba_kernels": False, "num_hidden_layers": 5, "attn_layer_period": 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "chunk_size": 8},
}  # fmt: skip


def made_by_hand(model_type: str) -> PretrainedConfig | None:
    """A config of a type that joins two others, or None."""
    return None
