"""Calls of a model of text without a cache: their outputs, and the loss of labels, against those of the whole model."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from model_coverage.inputs import BATCH, PADDED, Inputs, inputs_for
from model_coverage.sweeps.question import Question, not_in_transformers
from model_coverage.verdict import TOLERANCE, Entry, compare, tensors

KINDS = ("no mask", "padded", "packed", "labels")
_PACKED_AT = 5  # tokens of the first of two sequences in a row
_NO_LABEL = -100
BY_DEFAULT = "as it is called by default"  # the name of a truth
_BY_DEFAULT = "the model computes something else with use_cache=False; equal to what it gives by default"


def questions(model: PreTrainedModel, task: str, padded: bool) -> Iterator[Question]:
    """Those that the model can be asked: padded rows only where it is finite with them, packed ones only where it takes
    positions."""
    for name, call in _calls(model, task, padded).items():
        yield _question(model, name, call)


def _calls(model: PreTrainedModel, task: str, padded: bool) -> dict[str, Inputs]:
    """Arguments of forward by the kind of call; none for a model of something else than text."""
    accepted = inspect.signature(model.forward).parameters
    given = inputs_for(model, task, padded=False)
    if "input_ids" not in given:
        return {}
    mask = given.pop("attention_mask", None)
    ids, calls = given["input_ids"], {"no mask": given}
    shown = dict(given)
    if padded and mask is not None:
        mask = torch.ones_like(mask)
        mask[0, -PADDED:] = 0
        shown["attention_mask"] = mask
        calls["padded"] = shown
    if "position_ids" in accepted and "decoder_input_ids" not in given and ids.dim() == 2:
        tokens = ids.shape[1]
        positions = torch.cat([torch.arange(_PACKED_AT), torch.arange(tokens - _PACKED_AT)])
        calls["packed"] = {**given, "position_ids": positions.expand(ids.shape[0], tokens).contiguous()}
    if "labels" in accepted:
        calls["labels"] = {**shown, "labels": _labels(model, task, shown)}
        calls["labels"].pop("decoder_input_ids", None)  # made of the labels
    return calls


def _labels(model: PreTrainedModel, task: str, shown: Inputs) -> torch.Tensor:
    """A class a sequence, or the tokens, of which padded ones and every third of the first row do not count."""
    if task == "sequence-classification":
        return torch.arange(BATCH) % model.config.num_labels
    labels = shown.get("decoder_input_ids", shown["input_ids"]).clone()
    mask = shown.get("attention_mask")
    if "decoder_input_ids" not in shown and mask is not None and mask.shape == labels.shape:  # not a row a codebook
        labels[mask == 0] = _NO_LABEL
    labels[0, ::3] = _NO_LABEL
    return labels


def _question(model: PreTrainedModel, name: str, call: Inputs) -> Question:
    try:
        expected = tensors(_without_cache(model, call))
    except Exception as error:
        return not_in_transformers(name, f"{type(error).__name__}: {error}")
    if not expected or not all(bool(value.isfinite().all()) for value in expected.values()):
        return not_in_transformers(name, "its output is not finite")

    def ask(asked: Any) -> dict[str, torch.Tensor]:
        return tensors(asked(**_copied(call)))

    def judge(answer: dict[str, torch.Tensor]) -> Entry:
        entry = compare(answer, expected, TOLERANCE[model.dtype])
        if entry["verdict"] == "wrong":
            by_default = compare(answer, tensors(model(**_copied(call))), TOLERANCE[model.dtype])
            if by_default["verdict"] == "right":
                return {**by_default, "truth": BY_DEFAULT, "reason": _BY_DEFAULT}
        return entry

    return Question(name, ask, judge, call=call, expected=expected)


def _copied(call: Inputs) -> Inputs:
    """The arguments of one call: XGLM's (4.57) adds to the positions that it is given, in place."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in call.items()}


def _without_cache(model: PreTrainedModel, call: Inputs) -> Any:
    """The model's answer with use_cache=False, which a call of a split model means that says nothing of a cache: with
    one of its own transformers takes packed rows for one sequence. Some forwards take use_cache among **kwargs."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    if "use_cache" not in parameters and takes_any:
        with contextlib.suppress(TypeError):
            return model(**_copied(call), use_cache=False)
    return model(**_copied(call), use_cache=False) if "use_cache" in parameters else model(**_copied(call))


__all__ = ["BY_DEFAULT", "KINDS", "questions"]
