"""Tiny configs of any type, from the names of the arguments of its config class.

A mix as models have it: four query heads on two KV heads, two layers, four experts of which two work, and a vocabulary
that three ranks cannot share evenly. What names alone cannot tell stands in overrides.py.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS = 32, 4, 2, 8, 56, 2
VOCAB, POSITIONS, WINDOW, IMAGE = 100, 128, 6, 32

# Argument of a config -> its tiny value, set where the config class has such an argument.
_SIZES: dict[str, Any] = {
    # vocabularies; ids below 3 mean something
    **dict.fromkeys(("vocab_size", "src_vocab_size", "tgt_vocab_size", "vocab_size_per_layer_input"), VOCAB),
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "pad_index": 0, "bos_index": 1, "eos_index": 2,
    "decoder_start_token_id": 1,
    # widths
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "dim", "word_embed_proj_dim", "d_embed",
                     "embedding_dim", "input_embedding_size", "output_embedding_size", "lru_width"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "dff", "dim_ff", "decoder_ffn_dim",
                     "hidden_dim", "encoder_ffn_dim", "ffn_hidden_size", "intermediate_size_mlp",
                     "decoder_intermediate_size", "feed_forward_size", "mlp_dim",
                     "speech_encoder_intermediate_size", "d_inner"), INNER),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
                     "expert_ffn_hidden_size"), 24),
    "embedding_size": 16, "entity_emb_size": 16, "projection_dim": 24, "hidden_size_per_layer_input": 8,
    "image_text_hidden_size": 24, "classifier_proj_size": 24,
    # layers
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
                     "num_decoder_layers", "num_encoder_layers", "decoder_num_hidden_layers",
                     "encoder_num_hidden_layers", "speech_encoder_layers"), LAYERS),
    "max_window_layers": 1, "t2u_encoder_layers": 1, "t2u_decoder_layers": 1, "first_k_dense_replace": 1,
    # heads
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads",
                     "attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads", "num_heads",
                     "encoder_num_attention_heads", "decoder_num_attention_heads", "speech_encoder_attention_heads",
                     "t2u_encoder_attention_heads", "t2u_decoder_attention_heads", "num_self_attention_heads",
                     "num_cross_attention_heads", "cross_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "encoder_num_key_value_heads",
                     "decoder_num_key_value_heads", "cross_num_key_value_heads"), KV_HEADS),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "dim_head", "attention_head_size", "kv_channels", "cross_head_dim",
                     "linear_key_head_dim", "linear_value_head_dim"), HEAD_DIM),
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "rotary_dim": 4,
    "q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
    "laurel_rank": 8,
    # positions
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_source_positions",
                     "max_target_positions", "max_encoder_position_embeddings", "max_decoder_position_embeddings",
                     "context_length", "max_positions", "position_bias_max_distance", "max_text_positions",
                     "t2u_max_position_embeddings"), POSITIONS),
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size", "local_attention"), WINDOW),
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k"), 2),
    "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "moe_num_shared_experts": 1, "zero_expert_num": 2,
    "expert_capacity": 64,
    # state spaces
    "mamba_d_state": 8, "state_size": 8, "mamba_n_heads": 4, "n_mamba_heads": 2, "mamba_chunk_size": 8,
    "mamba_d_conv": 4, "mamba_dt_rank": 4, "time_step_rank": 4, "mamba_d_ssm": 64, "mamba_d_head": 16,
    # images and sound
    "image_size": IMAGE, "patch_size": 8, "num_mel_bins": 16, "num_labels": 5,
}  # fmt: skip
# None by default means "not at all": left so. For the others None means "as many as ...", or a size worked out.
_LEFT_NONE = frozenset({"sliding_window", "num_decoder_layers", "attention_window_size", "attention_chunk_size"})


def tiny_arguments(config_class: type[PretrainedConfig], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that make a tiny config of this class.

    `overrides` go last; a mapping there whose key is a sub-config's name ("text_config") overrides within it, also
    where the config has no such part by default.
    """
    default = _default(config_class)
    parts = getattr(config_class, "sub_configs", None)
    parts = parts if isinstance(parts, dict) else {}  # a property in old classes
    arguments: dict[str, Any] = {}
    for name, parameter in _parameters(config_class).items():
        value = getattr(default, name, parameter.default) if default is not None else parameter.default
        part = type(value) if isinstance(value, PretrainedConfig) else parts.get(name) if name in overrides else None
        if part is not None:
            if (inner := overrides.get(name, {})) is not None:
                arguments[name] = tiny_arguments(part, inner)
                if "model_type" in inner or part.model_type:
                    arguments[name]["model_type"] = part.model_type
        elif name in _SIZES and not _stays(name, parameter.default, value):
            arguments[name] = copy.deepcopy(_SIZES[name])
    arguments.update(_one_layer_of_each_kind(config_class, default, arguments, overrides))
    for name, value in overrides.items():
        if not isinstance(parts.get(name), type) and not isinstance(arguments.get(name), dict):
            arguments[name] = copy.deepcopy(value)
    return arguments


def _one_layer_of_each_kind(
    config_class: type[PretrainedConfig], default: Any, arguments: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the arguments for one layer of each kind that the type has, where its config says each layer's kind."""
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    settled = "layer_types" in overrides or isinstance(getattr(config_class, "layer_types", None), property)
    if len(kinds) < 2 or settled or "num_hidden_layers" in overrides or "num_hidden_layers" not in arguments:
        return {}
    found = {"num_hidden_layers": len(kinds), "layer_types": kinds}
    if mlps := list(dict.fromkeys(getattr(default, "mlp_layer_types", None) or ())):
        found["mlp_layer_types"] = (mlps * len(kinds))[: len(kinds)]
    return found


_SPECIAL_IDS = {
    name: _SIZES[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
}


def _stays(name: str, default: Any, value: Any) -> bool:
    """Whether an argument keeps its default: off, or a list with an entry for each stage, which has no one size."""
    return (default is None and name in _LEFT_NONE) or isinstance(value, (list, tuple, str, dict, bool))


def _default(config_class: type[PretrainedConfig]) -> PretrainedConfig | None:
    """The config without arguments, to see which attributes are configs themselves; None where there is none."""
    try:
        default = config_class()
    except Exception:
        return None
    for config in (default, *vars(default).values()):  # transformers 5: some differ from layer to layer
        if hasattr(config, "allow_global_per_layer_attribute_access"):
            config.allow_global_per_layer_attribute_access = True
    return default


def _parameters(config_class: type[PretrainedConfig]) -> dict[str, inspect.Parameter]:
    """The named arguments of the constructors, the class's own first."""
    found: dict[str, inspect.Parameter] = {}
    for cls in config_class.__mro__:
        if cls is PretrainedConfig:
            break
        if "__init__" in cls.__dict__:
            for name, parameter in inspect.signature(cls.__init__).parameters.items():
                if name != "self" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                    found.setdefault(name, parameter)
    return found


def tiny_config(config_class: type[PretrainedConfig], overrides: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """A tiny config of that class. Every type gets the same special ids, also one whose class does not name them."""
    return config_class(**{**_SPECIAL_IDS, **tiny_arguments(config_class, overrides or {})})
