"""The shape of every input that a model's forward may take, in size symbols; one row an input.

    B  sequences                      T  tokens the mask covers: the step's and those cached before
    S  tokens of the step             E  tokens (or frames) that an encoder reads, where a decoder follows it
    D  the width of the embeddings

A row for features (spectrograms, ...) is a function of the config: how many there are is nowhere else. "S*8" is eight a
token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from transformers import PretrainedConfig

from autodist_fx.calls.input_spec import Dims, InputSpec

# Integers, int64. Anything else that ends in "_ids" is taken for token ids.
TOKENS: dict[str, Dims] = {
    "input_ids": ("B", "S"),
    "attention_mask": ("B", "T"),
    "position_ids": ("B", "S"),
    "token_type_ids": ("B", "S"),
    "labels": ("B", "S"),
    "cache_position": ("S",),
    "num_items_in_batch": (),
}
# What differs, or is there besides, where an encoder reads the main input and a decoder writes.
ENCODER_DECODER_TOKENS: dict[str, Dims] = {
    "input_ids": ("B", "E"),
    "attention_mask": ("B", "E"),
    "position_ids": ("B", "E"),
    "token_type_ids": ("B", "E"),
    "decoder_input_ids": ("B", "S"),
    "decoder_attention_mask": ("B", "T"),
    "decoder_position_ids": ("B", "S"),
    "labels": ("B", "S"),
}
# Numbers in the model's dtype.
FEATURES: dict[str, Callable[[PretrainedConfig, bool], Dims | None]] = {
    "inputs_embeds": lambda config, has_encoder: ("B", "E" if has_encoder else "S", "D"),
    "decoder_inputs_embeds": lambda config, has_encoder: ("B", "S", "D"),
    "input_features": lambda config, has_encoder: _input_features(config),
    "input_values": lambda config, has_encoder: ("B", "E"),
}


def input_dims(name: str, config: PretrainedConfig, has_encoder: bool) -> tuple[Dims, bool] | None:
    """(dims, whether it holds floating-point numbers) of one input; None for one that nothing is known of.

    `has_encoder`: an encoder reads the main input, and a decoder the decoder_... ones.
    """
    if name in FEATURES:
        dims = FEATURES[name](config, has_encoder)
        return None if dims is None else (dims, True)
    tokens = {**TOKENS, **ENCODER_DECODER_TOKENS} if has_encoder else TOKENS
    found = tokens.get(name)
    patches = patches_demanded(config)
    if patches is not None and name in ("pixel_attention_mask", "spatial_shapes"):
        return (("B", patches) if name == "pixel_attention_mask" else ("B", 2)), False
    if found is None and name.endswith("_ids"):
        found = ("B", "S")
    if found == ("B", "E") and name == "attention_mask":
        frames = frames_demanded(config)
        found = found if frames is None else ("B", frames)
    return None if found is None else ((*found, *_ids_of_a_token(name, config)), False)


def _ids_of_a_token(name: str, config: PretrainedConfig) -> tuple[int, ...]:
    """Return the dim that token ids have where several stand for one: channels of sound that a decoder writes, or a
    text's and one of each codebook; () otherwise."""
    if name == "decoder_input_ids":
        channels = getattr(getattr(config, "decoder_config", None), "num_channels", None)
        return () if channels is None else (channels,)
    if name == "input_ids" and hasattr(config, "codebook_vocab_size"):
        return (1 + config.num_codebooks,)
    return ()


_CHOICES = 2  # an example of how many answers there are to choose among


def is_multiple_choice(model_class: str) -> bool:
    """Return whether a model of this class reads several sequences, [B, choices, S], and tells which is the right
    one."""
    # Not at the top: a rank that starts from an artifact needs no list of models.
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

    return model_class in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values()


def choice_specs(names: Collection[str]) -> dict[str, InputSpec]:
    """Return the specs of such a model's inputs: how many choices there are is a constant of its graph."""
    tokens = (name for name in names if TOKENS.get(name) in (("B", "S"), ("B", "T")) and name != "labels")
    return {
        **{name: InputSpec(("B", _CHOICES, "S"), torch.long) for name in tokens},
        **({"labels": InputSpec(("B",), torch.long)} if "labels" in names else {}),
    }


# Mappings of transformers' auto classes whose heads give one answer for a sequence: a label each.
_ONE_ANSWER = (
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES",
)


def answers_once(model_class: str) -> bool:
    """Return whether a model of this class gives one answer for a sequence or an image, so that its labels are [B]."""
    from transformers.models.auto import modeling_auto

    names = (getattr(modeling_auto, mapping, {}) for mapping in _ONE_ANSWER)
    return any(model_class in ({v} if isinstance(v, str) else set(v)) for found in names for v in found.values())


def _input_features(config: PretrainedConfig) -> Dims | None:
    """Return the shape of spectrograms: [B, bins, frames] where the number of frames is fixed or follows from that
    of tokens, else [B, frames, bins]."""
    frames = frames_demanded(config)
    if frames is not None:
        return ("B", config.num_mel_bins, frames)
    if (frames_of_a_token := getattr(config, "audio_length_per_tok", None)) is not None:
        return ("B", config.audio_config.num_mel_bins, f"S*{frames_of_a_token}")
    for attribute in ("input_feat_per_channel", "feature_projection_input_dim", "d_model"):
        bins = getattr(config, attribute, None)
        if isinstance(bins, int):
            return ("B", "E", bins)
    bins = getattr(getattr(config, "encoder_config", None), "num_mel_bins", None)
    return None if bins is None else ("B", "E", bins)


def patches_demanded(config: PretrainedConfig) -> int | None:
    """How many patches an image is padded to that comes as such; None for images of one size."""
    vision = getattr(config, "vision_config", config)
    patches = getattr(vision, "num_patches", None)
    return patches if isinstance(patches, int) and getattr(vision, "image_size", None) is None else None


def frames_demanded(config: PretrainedConfig) -> int | None:
    """How many frames an encoder with a position for each two of them takes: no more, no less. None: any number."""
    positions = getattr(config, "max_source_positions", None)
    return 2 * positions if positions is not None and hasattr(config, "num_mel_bins") else None
