"""Decoding with a KV cache: a prompt, then one token after the other, by the model itself and by its split form."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.utils import ModelOutput

from autodist_fx.api.compiled_model import CompiledModel
from autodist_fx.calls.cache_names import CACHE_ARGUMENTS
from model_coverage.inputs import NEW_TOKENS, Inputs

Parts = list[torch.Tensor]  # logits [batch, tokens, vocab] of each step


def eager_decoding(model: PreTrainedModel, inputs: Inputs) -> list[Parts] | None:
    """The logits that decoding may give; None if the model has no cache of any kind.

    Two truths where both exist: the whole sequence at once, and the model's own decoding with its own cache.
    """
    if not {*CACHE_ARGUMENTS, "use_cache"} & set(inspect.signature(model.forward).parameters):
        return None
    truths: list[Parts] = []
    try:
        whole = forward(model, {**inputs, **_positions(model, inputs)})
        truths.append([whole.logits[:, start:stop] for start, stop in _steps(inputs)])
    except Exception:
        pass
    for make in (_given_by_generate, lambda model: EncoderDecoderCache(DynamicCache(), DynamicCache())):
        try:  # some fail to make one themselves
            truths.append(_with_own_cache(model, inputs, make(model)))
            break
        except Exception:
            pass
    return truths or None


def _given_by_generate(model: PreTrainedModel) -> DynamicCache | None:
    """The cache that transformers 5's generate hands to a decoder's first call; None where models make their own."""
    of_5 = "cache" in inspect.signature(model.forward).parameters and not model.config.is_encoder_decoder
    return DynamicCache(config=model.config) if of_5 else None


def _with_own_cache(model: PreTrainedModel, inputs: Inputs, cache: Any) -> Parts:
    accepted, parts = inspect.signature(model.forward).parameters, []
    name = next((n for n in (*CACHE_ARGUMENTS[:2], "state") if n in accepted), "")  # "": modules keep it
    for start, stop in _steps(inputs):
        given = {name: cache} if name else {"cache_position": torch.arange(start, stop)}
        step = model(**_slice(model, inputs, start, stop), **given, use_cache=True)
        cache = step.get(name, cache)  # some write into the one that they are given, and return none
        parts.append(step.logits)
    return parts


def forward(model: PreTrainedModel, inputs: Inputs) -> ModelOutput:
    """The model's output, called as by a user; without making a cache where it only runs like that."""
    try:
        return model(**inputs)
    except Exception:
        if "use_cache" not in inspect.signature(model.forward).parameters:
            raise
        return model(**inputs, use_cache=False)


def decode_with_cache(compiled: CompiledModel, model: PreTrainedModel, inputs: Inputs) -> Parts:
    """The logits of the split model."""
    cache, parts = None, []
    for start, stop in _steps(inputs):
        step = compiled.simulate(**_slice(model, inputs, start, stop), past_key_values=cache)
        cache = step.past_key_values
        parts.append(step.logits)
    return parts


def counted(parts: Parts, like: Parts, inputs: Inputs) -> torch.Tensor:
    """Those logits [tokens, vocab] of `parts` that count: of tokens of which `like` has logits, too (some models give
    only the last token's in a step), and that are no padding."""
    kept, found = _kept(inputs), []
    for part, other, (start, stop) in zip(parts, like, _steps(inputs), strict=True):
        tokens = other.shape[1]
        if tokens <= stop - start and part.shape[1] >= tokens and part.shape[0] == len(kept):
            found.append(part[:, -tokens:][kept[:, stop - tokens : stop]])
        else:  # something else than one a token
            found.append(part.reshape(-1, part.shape[-1]))
    return torch.cat(found)


def _steps(inputs: Inputs) -> Iterator[tuple[int, int]]:
    tokens = inputs[_written(inputs)].shape[1]
    yield 0, tokens - NEW_TOKENS
    yield from ((at, at + 1) for at in range(tokens - NEW_TOKENS, tokens))


def _written(inputs: Inputs) -> str:
    """The name of the token ids that decoding appends to."""
    return "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"


def _kept(inputs: Inputs) -> torch.Tensor:
    """Which tokens count: what a padding token attends to is nobody's business, and differs with the cache."""
    if "attention_mask" in inputs and "decoder_input_ids" not in inputs:
        return inputs["attention_mask"].bool()
    return torch.ones(inputs[_written(inputs)].shape[:2], dtype=torch.bool)


def _slice(model: PreTrainedModel, inputs: Inputs, start: int, stop: int) -> Inputs:
    if "decoder_input_ids" in inputs:  # what the encoder reads, it reads at each step
        return {**inputs, "decoder_input_ids": inputs["decoder_input_ids"][:, start:stop]}
    step = {"input_ids": inputs["input_ids"][:, start:stop]}
    if "attention_mask" in inputs:
        step["attention_mask"] = inputs["attention_mask"][:, :stop]
    step.update({name: value[:, start:stop] for name, value in _positions(model, inputs).items()})
    return step


def _positions(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Position ids that skip the padding, for models that take them."""
    if "position_ids" not in inspect.signature(model.forward).parameters or "attention_mask" not in inputs:
        return {}
    if "decoder_input_ids" in inputs:
        return {}
    return {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
