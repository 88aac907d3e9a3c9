"""Inputs of a model for a task: seeded, with padding, and long enough for windows to matter."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from transformers import PretrainedConfig, PreTrainedModel

from model_coverage.shrink import IMAGE, VOCAB

BATCH, SEQ, NEW_TOKENS, PADDED = 2, 13, 5, 2
FRAMES, SAMPLES = 64, 2048  # of sound
FIRST_ID = 3  # ids below are special
Inputs = dict[str, torch.Tensor]


def inputs_for(model: PreTrainedModel, task: str, *, padded: bool = True) -> Inputs:
    """Returns what forward is called with, by name; only what its signature takes."""
    accepted = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(7)
    made: Inputs = {}
    for make in _MAKERS[task]:
        made.update(make(model, generator, padded))
    return {name: value for name, value in made.items() if name in accepted}


def token_ids(model: PreTrainedModel, seq: int, generator: torch.Generator) -> torch.Tensor:
    """[BATCH, seq] of ids that mean nothing special, a row a codebook where the model has such."""
    vocab = min(int(getattr(model.config.get_text_config(decoder=True), "vocab_size", VOCAB)), VOCAB)
    codebooks = getattr(model.config, "num_codebooks", 1) if hasattr(model, "build_delay_pattern_mask") else 1
    return torch.randint(FIRST_ID, vocab - 1, (BATCH * codebooks, seq), generator=generator)


def _prompt(model: PreTrainedModel, generator: torch.Generator, padded: bool) -> Inputs:
    """The first sequence is padded on the left, as for generating."""
    ids = token_ids(model, SEQ, generator)
    mask = torch.ones(BATCH, SEQ, dtype=torch.long)
    mask[0, : PADDED * padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _text(model: PreTrainedModel, generator: torch.Generator, padded: bool) -> Inputs:
    """The first sequence is padded on the right."""
    ids = token_ids(model, SEQ, generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, -PADDED:] = 0
        ids[0, -PADDED:] = model.config.pad_token_id or 0
    image_token, count = (getattr(model.config, n, None) for n in ("image_token_index", "mm_tokens_per_image"))
    if image_token is not None and count is not None:
        ids[:, 1 : 1 + count] = image_token  # an image stands there
    if hasattr(model.config, "codebook_vocab_size"):  # a token of text and one of each codebook
        ids = ids[:, :, None].repeat(1, 1, 1 + model.config.num_codebooks) % model.config.codebook_vocab_size
    sound: Inputs = {}
    if hasattr(model.config, "audio_length_per_tok"):  # what is heard while a token is said
        frames = SEQ * model.config.audio_length_per_tok
        sound["input_features"] = _noise((BATCH, model.config.audio_config.num_mel_bins, frames), model, generator)
    return {"input_ids": ids, "attention_mask": mask, **sound}


def _ended_text(model: PreTrainedModel, generator: torch.Generator, padded: bool) -> Inputs:
    """The same, with an end of sequence: what some models take their sentence from."""
    text = _text(model, generator, padded)
    last = text["attention_mask"].sum(-1) - 1
    text["input_ids"][torch.arange(BATCH), last] = model.config.eos_token_id
    return text


def _reply(model: PreTrainedModel, generator: torch.Generator, padded: bool) -> Inputs:
    """[BATCH, tokens], or [BATCH, tokens, channels] of sound."""
    ids = token_ids(model, SEQ - 4, generator)
    channels = getattr(getattr(model.config, "decoder_config", None), "num_channels", None)
    return {"decoder_input_ids": ids if channels is None else ids[:, :, None].repeat(1, 1, channels)}


def _text_or_sound(model: PreTrainedModel, generator: torch.Generator, padded: bool) -> Inputs:
    """Sound only for models that have no text to put it into."""
    reads_text = "input_ids" in inspect.signature(model.forward).parameters
    return (_text if reads_text else _sound)(model, generator, padded)


def _pixels(model: PreTrainedModel, generator: torch.Generator, padded: bool) -> Inputs:
    """Text, too, for models that put the image into it, or that take an image as text."""
    image = _image(model, generator, padded)
    with_text = "pixel_values" not in inspect.signature(model.forward).parameters or hasattr(
        model.config, "image_token_index"
    )
    return {**(_text(model, generator, False) if with_text else {}), **image}


def _image(model: PreTrainedModel, generator: torch.Generator, padded: bool) -> Inputs:
    """[BATCH, channels, height, width], or where the model takes an image in patches, those; [BATCH, frames, channels,
    height, width] where it takes videos."""
    config = _part(model.config, "vision_config")
    if "spatial_shapes" in inspect.signature(model.forward).parameters:
        patches, wide = config.num_patches, config.num_channels * config.patch_size**2
        mask = torch.ones(BATCH, patches, dtype=torch.long)
        shapes = torch.tensor([[patches // 4, 4]] * BATCH)
        return {
            "pixel_values": _noise((BATCH, patches, wide), model, generator),
            "pixel_attention_mask": mask,
            "spatial_shapes": shapes,
        }
    size = getattr(config, "image_size", IMAGE)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(config, "num_channels", 3)
    if "pixel_values" not in inspect.signature(model.forward).parameters and hasattr(config, "num_frames"):
        frames = (BATCH, config.num_frames, channels, height, width)
        return {"pixel_values_videos": _noise(frames, model, generator)}
    return {"pixel_values": _noise((BATCH, channels, height, width), model, generator)}


def _sound(model: PreTrainedModel, generator: torch.Generator, padded: bool) -> Inputs:
    """Spectra [BATCH, frames, bins], or [BATCH, bins, frames] where a stem convolves over frames; else samples."""
    if "input_features" not in inspect.signature(model.forward).parameters:
        return _samples(model, generator, padded)
    config = model.config
    names = ("feature_projection_input_dim", "num_mel_bins", "input_feat_per_channel", "d_model")
    parts = (config, _part(config, "encoder_config"))
    bins = next((getattr(part, name) for part in parts for name in names if hasattr(part, name)), None)
    if bins is None:
        return _samples(model, generator, padded)
    if hasattr(config, "num_mel_bins"):
        return {"input_features": _noise((BATCH, bins, 2 * config.max_source_positions), model, generator)}
    return {"input_features": _noise((BATCH, FRAMES, bins), model, generator)}


def _samples(model: PreTrainedModel, generator: torch.Generator, padded: bool) -> Inputs:
    return {"input_values": _noise((BATCH, SAMPLES), model, generator)}


def _part(config: PretrainedConfig, name: str) -> PretrainedConfig:
    return getattr(config, name, config)


def _noise(shape: tuple[int, ...], model: PreTrainedModel, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(model.dtype)


_Maker = Callable[[PreTrainedModel, torch.Generator, bool], Inputs]
_MAKERS: dict[str, tuple[_Maker, ...]] = {
    "causal-lm": (_prompt,),
    "seq2seq-lm": (_text, _reply),
    "masked-lm": (_text, _samples),
    "sequence-classification": (_ended_text,),
    "image-classification": (_pixels,),
    "speech-seq2seq": (_text_or_sound, _reply),
    "two-tower": (_text, _image),
}
