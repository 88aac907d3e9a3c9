"""The points: model shapes x plans x kinds of work, and what is predicted of each before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import shapes
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

from autodist_fx.measure.predict import Forecast
from cost_model.mesh import Mesh
from cost_model.request.plan_options import PlanOptions

BATCH, TOKENS = 4, 128  # of a forward pass
PROMPT, NEW_TOKENS = 256, 24  # of generating: one sequence
TRAIN_BATCH, TRAIN_TOKENS = 4, 64
KINDS = ("forward", "prefill", "decode step", "training step")
_NO_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def models() -> dict[str, PretrainedConfig]:
    """Shapes whose products differ: wide and flat, narrow and deep, tied, with and without KV heads shared."""
    return {
        "llama-125m": shapes.bench_llama(),
        "llama-wide": LlamaConfig(
            hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16,
            num_key_value_heads=16, vocab_size=16000, tie_word_embeddings=False, **_NO_ENDS,
        ),
        "llama-deep": LlamaConfig(
            hidden_size=384, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=6,
            num_key_value_heads=2, vocab_size=8192, tie_word_embeddings=False, **_NO_ENDS,
        ),
        "qwen2": Qwen2Config(
            hidden_size=896, intermediate_size=4864, num_hidden_layers=3, num_attention_heads=14,
            num_key_value_heads=2, vocab_size=20000, tie_word_embeddings=True, **_NO_ENDS,
        ),
        "gpt2": GPT2Config(
            n_embd=768, n_layer=6, n_head=12, vocab_size=20000, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            **_NO_ENDS,
        ),
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Way:
    """A way to split a shape: a mesh, and roles that are fixed."""

    mesh: Mesh
    pin: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """For tables."""
        return ", ".join([str(self.mesh), *(f"{role} {pattern}" for pattern, role in self.pin)])


def ways(shape: str) -> list[Way]:
    """The meshes of two ranks and one; of Llama shapes also the two layouts that a layer's second product may have."""
    found = [Way(Mesh()), Way(Mesh(tp=2)), Way(Mesh(pp=2))]
    if shape.startswith("llama"):
        found += [Way(Mesh(tp=2), (("*.o_proj", role),)) for role in ("row", "column")]
    return found


@dataclass(slots=True)
class Point:
    """A prediction, and what was measured of it."""

    shape: str
    way: str
    kind: str
    predicted_seconds: float
    measured_seconds: float = 0.0
    predicted_bytes: int = 0  # on the fullest rank; 0 where memory is not compared
    measured_bytes: int = 0

    @property
    def error(self) -> float:
        """Relative to what was measured; below 0: predicted too fast."""
        return self.predicted_seconds / self.measured_seconds - 1


def predicted(shape: str, config: PretrainedConfig, way: Way, forecast: Forecast, hardware: Any) -> Iterator[Point]:
    """Predict all kinds but training, which an engine predicts itself once the model is split."""
    request = PlanOptions(tp=way.mesh.tp, pp=way.mesh.pp, pin=way.pin, hardware=hardware).resolve("cpu-gloo")
    forward = forecast.forward(request, BATCH, TOKENS)
    prompt = forecast.step(request, 1, PROMPT, 0)
    step = forecast.step(request, 1, 1, PROMPT + NEW_TOKENS // 2)
    memory = max(forward.memory)
    yield Point(shape, way.name, "forward", forward.seconds, predicted_bytes=memory)
    yield Point(shape, way.name, "prefill", prompt.seconds)
    yield Point(shape, way.name, "decode step", step.seconds)
