"""Models of 70 families, tiny, each with the calls that show its rank programs: a prompt and a token after it, or a
batch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from tests.support.encoders import ENCODERS, VISION, images, segments, text_batch, tiny_encoder
from tests.support.generation.decoders import CASES, decoder
from tests.support.media.images import FAMILIES as MEDIA
from tests.support.media.images import question, vision_model
from tests.support.models import FAMILIES, padded_batch, tiny_model
from tests.support.moe import tiny_moe_model
from tests.support.seq2seq import seq2seq_inputs, tiny_seq2seq
from tests.support.state_space import CONFIGS, state_space_model

MOE = (
    "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "dbrx", "granitemoe", "gpt_oss", "llama4_text", "phimoe",
)  # fmt: skip
SEQ2SEQ = ("t5", "bart", "m2m_100", "whisper", "pegasus_x", "t5gemma")
_NO_MASK = ("zamba", "rwkv", "mpt", "bloom")  # one is NaN where a row sees nothing, or takes none
Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """A model, what `compile` is told besides its mesh, and calls: each goes on with the cache of the one before."""

    model: PreTrainedModel
    options: Mapping[str, Any]
    calls: tuple[Inputs, ...]


def _decoder(model: PreTrainedModel, prompt: int = 5) -> Subject:
    ids, mask = padded_batch(seq=prompt + 1)
    if model.config.model_type in _NO_MASK:
        mask = torch.ones_like(ids)
    names = inspect.signature(model.forward).parameters
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if "position_ids" in names else {}

    def call(start: int, stop: int) -> Inputs:
        given = {name: value[:, start:stop] for name, value in {"input_ids": ids, **positions}.items()}
        return {**given, "attention_mask": mask[:, :stop]}

    return Subject(model, {"use_cache": True}, (call(0, prompt), call(prompt, prompt + 1)))


def _encoder(class_name: str) -> Subject:
    kind, changes = ENCODERS[class_name]
    model, inputs = tiny_encoder(class_name, kind, **changes), text_batch()
    if "token_type_ids" in inspect.signature(model.forward).parameters and kind != "xlm":
        inputs["token_type_ids"] = segments() if model.config.type_vocab_size > 1 else torch.zeros_like(segments())
    return Subject(model, {"input_names": tuple(inputs)}, (inputs,))


def _images(class_name: str) -> Subject:
    kind, changes = VISION[class_name]
    model = tiny_encoder(class_name, kind, **changes)
    return Subject(model, {}, ({"pixel_values": images(model.config.image_size)},))


def _seq2seq(family: str) -> Subject:
    model = tiny_seq2seq(family, torch.float32 if family == "pegasus_x" else torch.float64)
    inputs = seq2seq_inputs(model)
    inputs.pop("decoder_attention_mask", None)
    ids = inputs.pop("decoder_input_ids")
    return Subject(
        model, {"use_cache": True},
        ({**inputs, "decoder_input_ids": ids[:, :3]}, {"decoder_input_ids": ids[:, 3:4]}),
    )  # fmt: skip


def _state_space(family: str) -> Subject:
    changes = {"attention_window_size": 32} if family == "recurrent_gemma" else {}
    return _decoder(state_space_model(family, **changes), prompt=6)


def _media(family: str) -> Subject:
    model, batch = vision_model(family), question(family, (1, 0, 2))
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
    positions = {} if "_vl" not in family else {"position_ids": torch.full((3, 3, 1), 20)}
    step = {"input_ids": torch.tensor([[5], [6], [7]]), "attention_mask": mask, **positions}
    return Subject(model, {"use_cache": True}, (batch, step))


def _makers() -> dict[str, Callable[[], Subject]]:
    plain = {family: (lambda family: _decoder(tiny_model(family))) for family in FAMILIES}
    plain |= dict.fromkeys(CASES, lambda case: _decoder(decoder(case)))
    plain |= {f"{family}, experts": (lambda name: _decoder(tiny_moe_model(name.partition(",")[0]))) for family in MOE}
    plain |= dict.fromkeys(CONFIGS, _state_space)
    plain |= dict.fromkeys(ENCODERS, _encoder)
    plain |= dict.fromkeys(VISION, _images)
    plain |= dict.fromkeys(SEQ2SEQ, _seq2seq)
    plain |= {family: _media for family in MEDIA if family in CONFIG_MAPPING}
    return {name: functools.partial(make, name) for name, make in plain.items()}


SUBJECTS = _makers()


def family_of(name: str) -> str:
    """Returns the model type of a subject: several subjects may be of one."""
    known: dict[str, Any] = {**CASES, **ENCODERS, **VISION}
    if name in CASES:
        return str(known[name][0])
    return str(known[name][0]) if name in known else name.partition(",")[0]
