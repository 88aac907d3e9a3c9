"""Configs of which no model can be built are named in one line."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

import autodist_fx as adx
from autodist_fx.errors import AutodistError


@pytest.mark.parametrize(
    "config_class, nonsense",
    [
        (GPT2Config, {"n_embd": "many"}), (GPT2Config, {"n_head": 0}), (GPT2Config, {"n_head": 5, "n_embd": 48}),
        (GPT2Config, {"vocab_size": -3}), (LlamaConfig, {"hidden_act": "nothing"}),
        (LlamaConfig, {"num_hidden_layers": "two"}), (LlamaConfig, {"vocab_size": None}),
    ],
    ids=["text", "zero", "odd", "negative", "activation", "layers", "none"],
)  # fmt: skip
def test_a_config_of_nonsense(config_class: type[PretrainedConfig], nonsense: dict[str, Any]) -> None:
    config = config_class()
    vars(config).update(nonsense)  # not by the constructor: transformers 5 looks at types there
    with pytest.raises(AutodistError, match=r"LMHeadModel|ForCausalLM") as refusal:
        adx.compile(config, tp=2)
    assert "cannot be built from its config" in str(refusal.value) and "\n" not in str(refusal.value)
