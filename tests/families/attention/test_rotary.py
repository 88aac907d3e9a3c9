"""Rotary embeddings of every type that transformers has, with the numbers of published configs and small sizes.

Lengths below and above the one that a config was trained at, call after call: "dynamic" and "longrope" choose their
frequencies by the longest position, and "dynamic" remembers it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import autodist_fx as adx
from cost_model.mesh import Mesh
from tests.support.float64 import in_float64
from tests.support.models import randomized, relative_error
from tests.support.ranks import on_ranks

TRAINED = 16  # positions that a config was trained at: published ones have 4096 to 32768
LENGTHS = (9, 40, 30, 12, 16, 17)
EXACT = 1e-9


def _factors(dims: int, first: float, last: float) -> list[float]:
    """Returns factors of LongRoPE, one a frequency, growing as published ones do."""
    return [round(first * (last / first) ** (k / (dims - 1)), 4) for k in range(dims)]


def _longrope(dims: int, **more: Any) -> dict[str, Any]:
    factors = {"short_factor": _factors(dims, 1.0, 1.6), "long_factor": _factors(dims, 1.03, 64.75)}
    return {"type": "longrope", **factors, **more}


_PHI_128K = {"max_position_embeddings": 32 * TRAINED, "original_max_position_embeddings": TRAINED}
# name -> (type of model, what its config says)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("llama", {}),
    "deepseek-coder": ("llama", {"rope_theta": 1e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "internlm3": ("llama", {"rope_theta": 5e7, "max_position_embeddings": TRAINED, "attention_bias": True,
                            "rope_scaling": {"rope_type": "dynamic", "factor": 6.0}}),
    "llama-3.1": ("llama", {"rope_theta": 5e5, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED}}),
    "qwen2.5-128k": ("qwen2", {"rope_theta": 1e6, "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}}),
    "deepseek-yarn": ("llama", {"rope_scaling": {
        "rope_type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.7,
        "original_max_position_embeddings": TRAINED}}),
    "phi-3-128k": ("phi3", {"rope_scaling": _longrope(6), **_PHI_128K}),
    "phi-3.5-mini": ("phi3", {"rope_scaling": _longrope(6), "sliding_window": 262144, **_PHI_128K}),
    "phi-4-mini": ("phi3", {"rope_scaling": _longrope(6), "hidden_size": 64, "partial_rotary_factor": 0.75,
                            "tie_word_embeddings": True, "num_key_value_heads": 2, **_PHI_128K}),
    "phi-3.5-moe": ("phimoe", {"num_local_experts": 4, **_PHI_128K, "rope_scaling": _longrope(
        6, rope_type="longrope", short_mscale=1.243, long_mscale=1.367, original_max_position_embeddings=TRAINED)}),
    "gpt-neox": ("gpt_neox", {"rotary_pct": 0.25, "hidden_size": 96, "rope_scaling": {
        "rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": TRAINED}),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.25, "hidden_size": 96}),
}  # fmt: skip
if "proportional" in ROPE_INIT_FUNCTIONS:  # transformers 5
    CONFIGS["gemma-4"] = ("gemma4_text", {"rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
        "vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8})
CHANGE = ("internlm3", "phi-3-128k", "phi-4-mini", "phi-3.5-moe")  # with the length: one of each kind


def _rope_type(said: dict[str, Any]) -> str:
    scaling = said.get("rope_scaling", {})
    return str(scaling.get("rope_type", scaling.get("type", "default")))


@pytest.fixture(autouse=True)
def _exactly() -> Iterator[None]:
    with in_float64(), torch.no_grad():
        yield


def _config(name: str) -> PretrainedConfig:
    kind, said = CONFIGS[name]
    sizes = {
        "vocab_size": 61, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return AutoConfig.for_model(kind, **{**sizes, "max_position_embeddings": 8 * TRAINED, **said})


def _model(name: str) -> PreTrainedModel:
    """A new one: some remember what they were called with."""
    return randomized(AutoModelForCausalLM.from_config(_config(name)).double().eval())


@functools.cache
def _ids(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(length))


def _check_sequences(split: Any, model: PreTrainedModel) -> None:
    """Now the model first and now the split: what either leaves on itself is nothing to the other."""
    for k, length in enumerate((*LENGTHS, *LENGTHS[::-1])):
        calls = [lambda n: split.simulate(input_ids=_ids(n)), lambda n: model(input_ids=_ids(n), use_cache=False)]
        first, second = (call(length).logits for call in (calls if k % 2 else calls[::-1]))
        assert relative_error(first, second) < EXACT, length


def _check_steps(split: Any, model: PreTrainedModel) -> None:
    """Two conversations that grow past what was trained, in prompts and in single tokens."""
    for _ in range(2):
        own, cache, at = None, DynamicCache(config=model.config), 0
        for tokens in (10, 1, 4, 1, 1, 9, 1):
            ids, at = _ids(27)[:, at : at + tokens], at + tokens
            expected = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            found = split.simulate(input_ids=ids, past_key_values=own, use_cache=True)
            own = found.past_key_values
            assert relative_error(found.logits, expected) < EXACT, at


def test_there_is_a_config_of_every_type() -> None:
    found = {_rope_type(said) for _, said in CONFIGS.values()}
    found |= {each["rope_type"] for _, said in CONFIGS.values() for each in said.get("rope_parameters", {}).values()}
    assert found == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.drawn(1)
@pytest.mark.parametrize("name", CHANGE)
def test_frequencies_that_change_with_the_length(name: str) -> None:
    """Without a cache and with one, in turn, on one split: what "dynamic" remembers is of both."""
    model = _model(name)
    compiled = adx.compile(model, tp=2, pp=2)
    _check_sequences(compiled, model)
    _check_steps(compiled, model)
    _check_sequences(compiled, model)


@pytest.mark.slow
@pytest.mark.drawn(1)
@pytest.mark.parametrize(("rope_type", "name"), [(_rope_type(said), name) for name, (_, said) in CONFIGS.items()])
def test_every_config_end_to_end(rope_type: str, name: str, tmp_path: Path) -> None:
    """Compiled without a cache and with one, proven, run, saved, loaded, proven and run again."""
    for use_cache, check in ((False, _check_sequences), (True, _check_steps)):
        model = _model(name)
        compiled = adx.compile(model, tp=2, pp=2, use_cache=use_cache)
        compiled.verify(numeric=True)
        check(compiled, model)
        compiled.save(tmp_path / str(use_cache))
        loaded = adx.load(tmp_path / str(use_cache))
        loaded.verify(numeric=True)
        check(loaded, _model(name))


def test_dynamic_frequencies_over_ranks() -> None:
    """generate and whole sequences, which have a graph each, remember one length."""
    model, options = _model("internlm3"), {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    lengths = (10, 20, 30, 18, 9, 12)

    def work(split: Any) -> list[Any]:
        found: list[Any] = []
        for k, length in enumerate(lengths):
            ids = _ids(length, 1)
            mask = torch.ones_like(ids)
            found.append(
                split(input_ids=ids, attention_mask=mask, use_cache=False).logits if k % 2
                else split.generate(ids, attention_mask=mask, **options)
            )  # fmt: skip
        return found

    every = on_ranks(model, Mesh(tp=2, pp=2), work)
    expected = work(_model("internlm3"))
    for found in every:
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape and relative_error(a.double(), b.double()) < EXACT


@pytest.mark.parametrize("name", ["internlm3", "phi-3-128k"])
def test_gradients_where_frequencies_change(name: str) -> None:
    model = _model(name)
    compiled = adx.compile(model, tp=2, pp=2, train=True)
    for length in (9, 24, 18):
        ids = _ids(length)
        found = compiled.gradients(input_ids=ids, labels=ids)
        model.zero_grad()
        with torch.enable_grad():
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for parameter, gradient in found.items():
            assert relative_error(gradient, model.get_parameter(parameter).grad) < EXACT, (length, parameter)
