"""Sliding windows in models whose masks transformers skips where nothing is hidden: a window hides tokens, too."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

import autodist_fx as adx
from tests.support.models import randomized, relative_error

WINDOW, TOKENS = 4, 11


def windowed(family: str) -> PreTrainedModel:
    """A model with tokens that may attend to later ones, of images or all; a layer with a window and one without."""
    sizes = {
        "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    if family == "gemma3_text":
        sizes["use_bidirectional_attention"] = True
    config = AutoConfig.for_model(family, **sizes)
    return randomized(AutoModelForCausalLM.from_config(config).double().eval())


@pytest.mark.drawn(1)
@pytest.mark.parametrize("family", ["gemma4_unified_text", "gemma3_text"])
def test_rows_longer_than_the_window(family: str) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    model = windowed(family)
    compiled = adx.compile(model, tp=2)
    ids = torch.arange(2 * TOKENS).view(2, TOKENS) % 97
    for length in (WINDOW - 1, TOKENS):  # in the window, and past it
        for mask in ({}, {"attention_mask": torch.ones(2, length, dtype=torch.long)}):
            for use_cache in (False, True):
                batch = {"input_ids": ids[:, :length], **mask, "use_cache": use_cache}
                with torch.no_grad():
                    expected = model(**batch).logits
                    found = compiled.simulate(**batch).logits
                assert relative_error(found, expected[:, -found.shape[1] :]) <= 1e-9, (length, [*mask], use_cache)


def test_packed_rows_of_layers_that_share_keys() -> None:
    """Without a mask and a cache, positions that begin again begin another sequence."""
    sizes = {"vocab_size_per_layer_input": 100, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2}
    config = AutoConfig.for_model(
        "gemma3n_text", vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=4, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=WINDOW, laurel_rank=4,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0], layer_types=["sliding_attention", "full_attention"] * 2,
        **sizes,
    )  # fmt: skip
    model = randomized(AutoModelForCausalLM.from_config(config).double().eval())
    if "shared_kv_states" not in inspect.signature(model.model.layers[0].self_attn.forward).parameters:
        pytest.skip("this transformers shares keys by a cache alone: without one the layers compute their own")
    ids = torch.arange(2 * TOKENS).view(2, TOKENS) % 97
    positions = torch.cat([torch.arange(5), torch.arange(TOKENS - 5)]).expand(2, TOKENS)
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=False).logits
        compiled = adx.compile(model, tp=2, input_names=["input_ids", "position_ids"])
        found = compiled.simulate(ids, position_ids=positions)
    assert relative_error(found.logits, expected) <= 1e-9
