"""Generating: the tokens of all ranks against those of transformers' own generate of the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from model_coverage.inputs import Inputs, inputs_for, token_ids
from model_coverage.sweeps.question import Question, not_in_transformers
from model_coverage.verdict import Entry


@dataclass(frozen=True, slots=True)
class Kind:
    """Two rows of `tokens`, the first of which begins with `pads`, and `new` tokens more."""

    name: str
    tokens: int
    new: int
    pads: int = 0
    beams: int = 1


KINDS = (  # windows are of six tokens: the first four stay within
    Kind("greedy", 3, 3),
    Kind("beams", 3, 3, beams=2),
    Kind("left-padded", 3, 3, pads=1),
    Kind("left-padded, beams", 3, 3, pads=1, beams=2),
    Kind("past the window", 14, 8, pads=5),
    Kind("past the window, beams", 14, 8, pads=5, beams=2),
)
SPECIAL_IDS = {"pad_token_id": 0, "eos_token_id": 2}
WITHOUT_CACHE, EAGER = "without its cache", "by eager attention"  # names of truths


def questions(model: PreTrainedModel, task: str, padded: bool) -> Iterator[Question]:
    """Those that the model can be asked: padded rows only where it reads tokens, and is finite with them."""
    reads_tokens = "input_ids" in inputs_for(model, task, padded=False)
    for kind in KINDS:
        if not kind.pads or (reads_tokens and padded):
            yield _question(model, task, kind)


def _question(model: PreTrainedModel, task: str, kind: Kind) -> Question:
    arguments: dict[str, Any] = {
        **_prompt(model, task, kind),
        **{"max_new_tokens": kind.new, "min_new_tokens": kind.new, "do_sample": False, "num_beams": kind.beams},
        **SPECIAL_IDS,
    }
    own = _tokens(model, arguments)
    without = _tokens(model, {**arguments, "use_cache": False}) if isinstance(own, str) else None
    if isinstance(own, str) and isinstance(without, str):
        return not_in_transformers(kind.name, own)

    def judge(answer: torch.Tensor) -> Entry:
        if not isinstance(own, str) and torch.equal(answer, own):
            return {"verdict": "right"}
        truth = _tokens(model, {**arguments, "use_cache": False}) if without is None else without
        if not isinstance(truth, str) and torch.equal(answer, truth):
            why = f"raises {own}" if isinstance(own, str) else "gives other tokens with its cache than without it"
            reason = f"transformers' own generate {why}; equal to it with use_cache=False"
            return {"verdict": "right", "truth": WITHOUT_CACHE, "reason": reason}
        if torch.equal(answer, _eager_tokens(model, arguments)):
            reason = "transformers' own generate gives other tokens by sdpa than eagerly; equal to the latter"
            return {"verdict": "right", "truth": EAGER, "reason": reason}
        wanted = truth if isinstance(own, str) else own
        return {"verdict": "wrong", "reason": f"{answer.tolist()} for {_listed(wanted)}"}

    return Question(kind.name, lambda asked: asked.generate(**arguments), judge)


def _prompt(model: PreTrainedModel, task: str, kind: Kind) -> Inputs:
    """A mask only where there is padding; what is no text as for any call."""
    given = inputs_for(model, task, padded=False)
    prompt = {name: x for name, x in given.items() if name != "attention_mask" and not name.startswith("decoder_")}
    if "input_ids" in prompt:
        ids = token_ids(model, kind.tokens, torch.Generator().manual_seed(1))
        ids[0, : kind.pads] = SPECIAL_IDS["pad_token_id"]
        prompt["input_ids"] = ids
        if kind.pads:
            prompt["attention_mask"] = torch.ones_like(ids)
            prompt["attention_mask"][0, : kind.pads] = 0
    return prompt


def _tokens(model: PreTrainedModel, arguments: dict[str, Any]) -> torch.Tensor | str:
    """The tokens, or what transformers raises."""
    try:
        return model.generate(**arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _eager_tokens(model: PreTrainedModel, arguments: dict[str, Any]) -> torch.Tensor:
    """The tokens by eager attention, which never leaves a mask out; none where the model has no other attention."""
    before = model.config._attn_implementation
    if before == "eager":
        return torch.empty(0)
    try:
        model.set_attn_implementation("eager")
        found = _tokens(model, arguments)
    finally:
        model.set_attn_implementation(before)
    return torch.empty(0) if isinstance(found, str) else found


def _listed(tokens: torch.Tensor | str) -> object:
    return tokens if isinstance(tokens, str) else tokens.tolist()


__all__ = ["EAGER", "KINDS", "WITHOUT_CACHE", "questions"]
