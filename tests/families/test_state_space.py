"""State-space, recurrent and hybrid models: right on every mesh, with their scans as single nodes of the graph, and
decoding with caches of their own."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import autodist_fx as adx
from autodist_fx.calls.cache_names import CACHE_FIELD
from autodist_fx.errors import AutodistError
from tests.support.models import padded_batch, relative_error
from tests.support.state_space import CONFIGS, state_space_model

MESHES = {"recurrent_gemma": ((3, 1),), "mamba": ((3, 1), (1, 2)), "bamba": ((3, 1), (1, 2))}  # others: (2, 2)


@pytest.mark.drawn(2)
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_forward_equals_eager(family: str) -> None:
    """At lengths below and above windows and chunks, since one graph serves them all."""
    model = state_space_model(family)
    for mesh in MESHES.get(family, ((2, 2),)):
        compiled = adx.compile(model, tp=mesh[0], pp=mesh[1])
        for length in (3, 14):
            ids, mask = padded_batch(seq=length)
            # a row that sees nothing but padding is NaN in this one's eager attention, and the next takes no mask
            inputs = {"input_ids": ids} if family in ("zamba", "rwkv") else {"input_ids": ids, "attention_mask": mask}
            expected = state_space_model(family)(**inputs, use_cache=False).logits  # a new one: some keep a state
            found = compiled.simulate(**inputs).logits
            assert relative_error(found, expected) <= 1e-6, (mesh, length)


def _eager_decoding(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of a prompt and of one token after the other, as transformers' generate calls the model."""
    taken = set(inspect.signature(model.forward).parameters) - {"logits_to_keep"}
    if CACHE_FIELD == "cache":  # transformers 5: no cache positions, which prepare_inputs_for_generation went by
        return _eager_decoding_5(model, ids, mask, prompt, taken)
    kept: dict[str, Any] = {
        "attention_mask": mask[:, :prompt], "use_cache": True, "cache_position": torch.arange(prompt),
    }  # fmt: skip
    logits = []
    for stop in range(prompt, ids.shape[1] + 1):
        inputs = model.prepare_inputs_for_generation(ids[:, :stop], **kept)
        outputs = model(**{name: value for name, value in inputs.items() if name in taken})
        logits.append(outputs.logits)
        kept = model._update_model_kwargs_for_generation(outputs, kept)
    return torch.cat(logits, 1)


def _eager_decoding_5(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, prompt: int, taken: set[str]
) -> torch.Tensor:
    name, logits = "cache" if "cache" in taken else "state", []  # rwkv's
    kept = DynamicCache(config=model.config) if name == "cache" else None
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for stop in range(prompt, ids.shape[1] + 1):
        given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, :stop], name: kept}
        new = None if stop == prompt else 1
        inputs = model.prepare_inputs_for_generation(
            ids[:, :stop], next_sequence_length=new, is_first_iteration=new is None, use_cache=True, **given
        )
        outputs = model(**{name: value for name, value in inputs.items() if name in taken})
        kept = outputs[name]
        logits.append(outputs.logits)
    return torch.cat(logits, 1)


@pytest.mark.drawn(3)
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_decoding_with_the_models_own_cache_equals_eager(family: str) -> None:
    """A prompt, then one token at a time; all on the ranks' own states."""
    prompt, total = 6, 9
    ids, mask = padded_batch(seq=total)
    if family in ("zamba", "rwkv"):
        ids, mask = ids[1:], mask[1:]
    # its cache has as many tokens as the window, and other code for longer prompts
    model = state_space_model(family, **({"attention_window_size": 32} if family == "recurrent_gemma" else {}))
    if family == "recurrent_gemma":  # transformers' own generate gives it all tokens at each step
        positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False, **positions).logits
    else:
        expected = _eager_decoding(state_space_model(family), ids, mask, prompt)
    layers_of_each = family in ("bamba", "falcon_h1", "zamba", "lfm2", "granitemoehybrid")
    compiled = adx.compile(
        model, tp=2, pp=1 if family == "recurrent_gemma" else 2, use_cache=True, cuts=[1] if layers_of_each else None
    )
    cache, logits = None, []
    for start, stop in [(0, prompt), *((at, at + 1) for at in range(prompt, total))]:
        inputs = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop], "past_key_values": cache}
        if "position_ids" in inspect.signature(model.forward).parameters:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
        step = compiled.simulate(**inputs)
        cache = step.past_key_values
        logits.append(step.logits)
    kept = mask.bool()
    assert relative_error(torch.cat(logits, 1)[kept], expected[kept]) <= 1e-6
    assert cache is not None and cache.get_seq_length() == total
    first, last = set(cache.ranks[0]), set(cache.ranks[-1])
    assert first or last
    if layers_of_each:
        assert first and last and not first & last, "each stage has the states of its own layers"


@torch.no_grad()
def test_two_tokens_after_the_prompt_are_refused() -> None:
    """Such a model has a graph for a prompt and one for one token more."""
    compiled = adx.compile(state_space_model("mamba"), tp=1, pp=1, use_cache=True)
    ids, _ = padded_batch(seq=6)
    cache = compiled.simulate(input_ids=ids[:, :4], past_key_values=None).past_key_values
    with pytest.raises(AutodistError, match="one token at a time"):
        compiled.simulate(input_ids=ids[:, 4:], past_key_values=cache)
