"""Calls a family's own `prepare_inputs_for_generation` for the inputs of a step: it is asked at each step, never
guessed.

Most families leave that to transformers. Others count positions in their own way (from padding_idx + 1), or drop the
cache where their rotary frequencies change (LongRoPE), and take the whole sequence anew.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import GenerationMixin

from autodist_fx.calls.cache_names import CACHE_FIELD
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.family_positions import counts_positions, family_positions

_TAKEN = ("input_ids", "attention_mask", "position_ids", "past_key_values", "cache_position")


def family_inputs(model: Any, input_ids: torch.Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the next forward, by name. `model` is one of the family, without weights; `input_ids`
    [batch, all tokens so far], and `given` is what else `generate` hands to its `prepare_inputs_for_generation`.

    Tensors that no usual step has (images, say) are among them, under forward's names. Raises AutodistError where the
    family gives its model an input that its forward does not name, or another number of positions than of tokens.
    """
    given = {name: value for name, value in given.items() if not name.endswith("tokenizer")}
    found = model.prepare_inputs_for_generation(input_ids, **given)
    found = {name: value for name, value in found.items() if value is not None}
    if CACHE_FIELD in found:
        found["past_key_values"] = found.pop(CACHE_FIELD)
    takes = inspect.signature(model.forward).parameters
    if own := sorted(name for name, value in found.items() if isinstance(value, torch.Tensor) and name not in _TAKEN
                     and name not in takes and value is not given.get(name)):  # fmt: skip
        raise AutodistError(
            f"generating, {type(model).__name__} gives itself {', '.join(own)}, which the ranks' graphs do not take: "
            "generate with the model itself"
        )
    ids, cache = found["input_ids"], found.get("past_key_values")
    before = 0 if cache is None else cache.get_seq_length()
    if found.get("position_ids") is None and counts_positions(model):
        others = {name: value for name, value in found.items() if name != "past_key_values"}
        found["position_ids"] = family_positions(model, others | ({} if cache is None else {CACHE_FIELD: cache}))
    positions = found.get("position_ids")
    if positions is not None and positions.shape[-1] != ids.shape[1]:
        raise AutodistError(
            f"generating, {type(model).__name__} gives itself {ids.shape[1]} tokens and {positions.shape[-1]} "
            "positions: generate with the model itself"
        )
    taken = {name: found.get(name) for name in _TAKEN}
    # of all tokens that are given, of which there are more than generate counts where the cache was dropped
    taken["cache_position"] = torch.arange(before, before + ids.shape[1], device=ids.device)
    taken["input_ids"] = ids.contiguous()
    return taken | {name: value for name, value in found.items() if name not in _TAKEN}


def of_family(model: Any, name: str) -> Any:
    """Return a method of generate's that the family's class has of its own, of `model`; None where it is transformers'
    common one, or there is no model."""
    own = getattr(type(model), name, None)
    return None if own in (None, getattr(GenerationMixin, name)) else getattr(model, name)


def expanded_media(model: Any, times: int, input_ids: torch.Tensor, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the images and sounds among `given`, repeated for a batch [rows, tokens] whose rows are each repeated so
    many times (beams). transformers 5 repeats what its encoder gives of them, row by row; {} for a model of a version
    that repeats the tensors themselves.

    Raises AutodistError where it cannot be told which row has which of them.
    """
    if times == 1 or "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        return {}
    names = [n for n, value in given.items() if isinstance(value, torch.Tensor) and _is_of_media(n)]
    rows = input_ids.shape[0]
    if rows == 1:
        return {n: given[n].repeat(times, *[1] * (given[n].dim() - 1)) for n in names}
    tokens = [getattr(model.config, f"{kind}_token_id", None) for kind in ("image", "video", "audio")]
    of_media = torch.isin(input_ids, torch.tensor([t for t in tokens if t is not None]).to(input_ids))
    if names and not (bool(of_media.any(-1).all()) and all(len(given[n]) == rows for n in names)):
        raise AutodistError(
            f"for beams or several answers {type(model).__name__}'s ranks repeat {', '.join(names)} with the rows of a "
            "batch, which needs one in each row: give one row at a time"
        )
    return {n: given[n].repeat_interleave(times, dim=0) for n in names}


def _is_of_media(name: str) -> bool:
    """Return whether an argument of that name is not one of text, which has a number for each token."""
    return not name.endswith("_ids") and name not in ("attention_mask", "cache_position")
