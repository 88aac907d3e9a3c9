"""Tiny encoder-decoder models, with random numbers in every parameter (see tiny_models), and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PretrainedConfig,
    PreTrainedModel,
)

from tests.support.models import randomized

_LAYERS = (
    "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "num_encoder_layers", "num_hidden_layers",
)  # fmt: skip
_TINY = {
    "vocab_size": 128, "d_model": 48, "d_kv": 8, "d_ff": 80, "num_heads": 6, "encoder_attention_heads": 6,
    "decoder_attention_heads": 6, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "max_position_embeddings": 64,
    "max_source_positions": 16, "max_target_positions": 64, "num_mel_bins": 10, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "forced_eos_token_id": None, "scale_embedding": True, "begin_suppress_tokens": None,
    "suppress_tokens": None, "decoder_vocab_size": 128, "hidden_size": 48, "num_encoder_attention_heads": 6,
    "num_decoder_attention_heads": 6, "ngram": 2, "num_buckets": 8, "relative_max_distance": 16, "block_size": 4,
    "local_radius": 3,
}  # fmt: skip


_HALF = {
    "vocab_size": 128, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "num_key_value_heads": 3,
    "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def tiny_seq2seq_config(family: str, layers: int = 2, **changes: Any) -> PretrainedConfig:
    if family == "t5gemma":  # a config of two
        half = {**_HALF, "num_hidden_layers": layers, **changes}
        return AutoConfig.for_model(family, encoder=dict(half), decoder=dict(half), vocab_size=half["vocab_size"])
    config = AutoConfig.for_model(family)
    for name, value in {**_TINY, **dict.fromkeys(_LAYERS, layers), **changes}.items():
        known = name in config.__dict__ or name in config.attribute_map  # some properties refuse to be set
        if known or name == "decoder_start_token_id":  # of each, though transformers 5 may leave it out
            setattr(config, name, value)
    return config


def tiny_seq2seq(family: str, dtype: torch.dtype = torch.float64, layers: int = 2, **changes: Any) -> PreTrainedModel:
    """In eval mode; every parameter random, none too large for the softmaxes to stay soft."""
    config = tiny_seq2seq_config(family, layers, **changes)
    mapping = AutoModelForSeq2SeqLM._model_mapping
    auto = AutoModelForSeq2SeqLM if type(config) in mapping else AutoModelForSpeechSeq2Seq
    model = auto.from_config(config).to(dtype).eval()
    for name in ("decoder_start_token_id", "pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(model.generation_config, name) is None:  # transformers 5 takes them from no config
            setattr(model.generation_config, name, _TINY[name])
    return randomized(model)


def seq2seq_inputs(model: PreTrainedModel, batch: int = 2, source: int = 9, target: int = 7) -> dict[str, torch.Tensor]:
    """Returns what the encoder reads, with a mask (the first sequence ends in two paddings), and what the decoder
    reads.

    Spectrograms have the length that the model demands, and no mask.
    """
    generator = torch.Generator().manual_seed(source)
    decoder_ids = torch.randint(3, 128, (batch, target), generator=generator)
    if model.main_input_name == "input_features":
        shape = (batch, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        features = torch.randn(shape, generator=generator, dtype=torch.float64).to(model.dtype)
        return {"input_features": features, "decoder_input_ids": decoder_ids}
    ids = torch.randint(3, 128, (batch, source), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    decoder_mask = torch.ones_like(decoder_ids)
    decoder_mask[1:2, -1] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": decoder_mask,
    }
