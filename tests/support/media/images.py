"""Tiny language models that read images or sounds, and batches of text and images for them, in float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLForConditionalGeneration

from tests.support.models import randomized

IMAGE, START, LAST = 90, 91, 95  # ids of tokens that an image's features take the place of, and that begin one
_TEXT = {
    "vocab_size": LAST, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
_IMAGE_TOKEN = {"image_token_id": IMAGE, "image_token_index": IMAGE}
_GRID = (1, 4, 2)  # of patches in time, height and width; merged 2 x 2
TOKENS = {"llava": 4, "gemma3": 4, "paligemma": 4, "idefics3": 1, "smolvlm": 1, "internvl": 1, "qwen2_vl": 2,
          "qwen2_5_vl": 2, "qwen3_vl": 2, "qwen2_audio": 3}  # of an image, or of a sound  # fmt: skip
FAMILIES = tuple(TOKENS)
Rows = Sequence[Sequence[int]]


def vision_model(family: str) -> PreTrainedModel:
    """In eval mode and float64, random numbers in every parameter."""
    classes = {
        "llava": "Llava", "gemma3": "Gemma3", "paligemma": "PaliGemma", "idefics3": "Idefics3", "smolvlm": "SmolVLM",
        "internvl": "InternVL", "qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL",
        "qwen2_audio": "Qwen2Audio",
    }  # fmt: skip
    cls = getattr(transformers, f"{classes[family]}ForConditionalGeneration")
    return randomized(cls(_config(family)).to(torch.float64).eval())


def question(family: str, images: Sequence[int] = (1,), mask: bool = True) -> dict[str, torch.Tensor]:
    """A batch with a row for each of `images`: so many images among its text, or sounds; rows are padded on the left.

    `mask`: with an attention mask.
    """
    rows = [_row(family, count, 3 + 7 * at) for at, count in enumerate(images)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    batch = {"input_ids": ids}
    if mask:
        batch["attention_mask"] = (ids != 0).long()
    return {**batch, **_MEDIA.get(family, _pixels)(ids, list(images))} if sum(images) else batch


def _row(family: str, images: int, first: int) -> list[int]:
    row = [first, first + 1]
    for _ in range(images):
        row += [START, *[IMAGE] * TOKENS[family], first + 2]
    return [*row, first + 3]


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def _pixels(ids: torch.Tensor, images: list[int]) -> dict[str, torch.Tensor]:
    return {"pixel_values": _noise(sum(images), 3, 8, 8)}


def _token_types(ids: torch.Tensor, images: list[int]) -> dict[str, torch.Tensor]:
    return {**_pixels(ids, images), "token_type_ids": (ids == IMAGE).long()}


def _by_row(ids: torch.Tensor, images: list[int]) -> dict[str, torch.Tensor]:
    """[rows, most images of a row, ...], zeros where a row has fewer."""
    pixels = torch.zeros(len(images), max(images), 3, 8, 8, dtype=torch.float64)
    for row, count in enumerate(images):
        pixels[row, :count] = _noise(count + row, 3, 8, 8)[row:]
    return {"pixel_values": pixels}


def _grids(ids: torch.Tensor, images: list[int]) -> dict[str, torch.Tensor]:
    """Every second image stands upright."""
    count, (time, height, width) = sum(images), _GRID
    grids = [(time, height, width) if at % 2 else (time, width, height) for at in range(count)]
    types = {"mm_token_type_ids": (ids == IMAGE).int()} if _takes_token_types() else {}
    patches = count * time * height * width
    return {"pixel_values": _noise(patches, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor(grids), **types}


def _sounds(ids: torch.Tensor, sounds: list[int]) -> dict[str, torch.Tensor]:
    seen = torch.ones(sum(sounds), 12, dtype=torch.long)
    return {"input_features": _noise(sum(sounds), 6, 12), "feature_attention_mask": seen}


_MEDIA: dict[str, Callable[[torch.Tensor, list[int]], dict[str, torch.Tensor]]] = {
    "gemma3": _token_types, "idefics3": _by_row, "smolvlm": _by_row, "qwen2_vl": _grids, "qwen2_5_vl": _grids,
    "qwen3_vl": _grids, "qwen2_audio": _sounds,
}  # fmt: skip


def _takes_token_types() -> bool:
    """Whether positions are counted by the kinds of tokens, as transformers 5 does, and not by the tokens."""
    return "mm_token_type_ids" in inspect.signature(Qwen2VLForConditionalGeneration.forward).parameters


def _config(family: str) -> PretrainedConfig:
    def made(text: dict[str, Any], vision: dict[str, Any], **more: Any) -> PretrainedConfig:
        return AutoConfig.for_model(family, text_config=text, vision_config=vision, **_IMAGE_TOKEN, **more)

    if family == "llava":
        return made({**_TEXT, "model_type": "llama"}, {**_VISION, "model_type": "clip_vision_model"})
    if family == "gemma3":
        layers: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
        layers |= {"head_dim": 8, "sliding_window": 8}
        vision = {**_VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
        return made({**_TEXT, **layers, "model_type": "gemma3_text"}, vision, mm_tokens_per_image=4)
    if family == "paligemma":
        vision = {**_VISION, "model_type": "siglip_vision_model", "projection_dim": 32}
        text = {**_TEXT, "model_type": "gemma", "head_dim": 8}
        return made(text, vision, projection_dim=32, hidden_size=32)
    if family == "internvl":
        vision = {**_VISION, "model_type": "internvl_vision", "image_size": (8, 8), "patch_size": (4, 4)}
        return made({**_TEXT, "model_type": "qwen2"}, vision, downsample_ratio=0.5, image_seq_length=1)
    if family in ("idefics3", "smolvlm"):
        return made({**_TEXT, "model_type": "llama"}, _VISION, scale_factor=2, pad_token_id=0)
    if family == "qwen2_audio":
        sound = {
            "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": 6,
            "max_source_positions": 6, "model_type": "qwen2_audio_encoder",
        }  # fmt: skip
        text = {**_TEXT, "model_type": "qwen2"}
        return AutoConfig.for_model(
            family, text_config=text, audio_config=sound, audio_token_index=IMAGE, audio_token_id=IMAGE
        )
    vision = {
        "qwen2_vl": {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        "qwen2_5_vl": {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "window_size": 16,
                       "fullatt_block_indexes": []},
        "qwen3_vl": {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "num_position_embeddings": 16,
                     "deepstack_visual_indexes": [0]},
    }[family]  # fmt: skip
    common = {"depth": 1, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "in_channels": 3, "in_chans": 3}
    sections: dict[str, Any] = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    sections |= {"mrope_interleaved": True} if family == "qwen3_vl" else {}
    name, more = ("rope_parameters", {"rope_theta": 1e4}) if _takes_token_types() else ("rope_scaling", {})
    text = {**_TEXT, "head_dim": 8, name: {**sections, **more}}
    special = {"video_token_id": 92, "vision_start_token_id": START, "vision_end_token_id": 93}
    return made(text, {**common, **vision}, **special)
