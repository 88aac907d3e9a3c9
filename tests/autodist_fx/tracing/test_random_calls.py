"""Random numbers while a model is traced: nodes where torch draws them, refused where Python decides by them."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, GPT2LMHeadModel

from autodist_fx.errors import TracingError
from autodist_fx.tracing import trace
from tests.support.models import tiny_config

_BART = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32,
}  # fmt: skip


def test_layers_that_are_left_out_by_chance_are_refused() -> None:
    """LayerDrop of 0 leaves none out, and evaluation either."""
    trace(BartForConditionalGeneration(BartConfig(**_BART)).train())
    model = BartForConditionalGeneration(BartConfig(**_BART, encoder_layerdrop=0.1))
    trace(model.eval())
    with pytest.raises(TracingError, match=r"modeling_bart.py:\d+ .*layerdrop.*a random number: set its probability"):
        trace(model.train())


def _seeded() -> float:
    np.random.seed(3)
    return float(np.random.rand())


DRAWS: dict[str, Callable[[], float]] = {
    "random": random.random, "numpy": np.random.rand, "torch": lambda: float(torch.empty(1).uniform_()),
    "seeded": _seeded,
}  # fmt: skip


class Tossing(GPT2LMHeadModel):
    draws = ""

    def forward(self, input_ids: torch.Tensor) -> object:  # type: ignore[override]
        number = random.uniform(0, 1) if self.draws == "random" else DRAWS[self.draws]()
        return super().forward(input_ids=input_ids, output_attentions=number > 2)


@pytest.mark.parametrize("draws", DRAWS)
def test_coins_that_python_tosses_are_refused(draws: str) -> None:
    """In training mode; what a model seeds for itself is the same at each call."""
    model = Tossing(tiny_config("gpt2", n_layer=1))
    model.draws = draws
    if draws == "seeded":
        trace(model.train(), input_names=("input_ids",))
        return
    if draws == "random":
        trace(model.eval(), input_names=("input_ids",))
    with pytest.raises(TracingError, match=rf"Tossing draws from {draws}.* when it is called in training mode"):
        trace(model.train(), input_names=("input_ids",))
    assert not hasattr(random.uniform, "__wrapped__")
