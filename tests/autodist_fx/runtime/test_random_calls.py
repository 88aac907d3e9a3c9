"""Calls drawn at random are answered alike by the unsplit model, by `simulate`, and over ranks.

ADX_RANDOM_CALLS says how many are drawn for each family; without it, one.
"""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import autodist_fx as adx
from autodist_fx.calls.cache_names import CACHE_FIELD, cache_of
from cost_model.mesh import Mesh
from tests.support.models import relative_error, tiny_model
from tests.support.moe import tiny_moe_model
from tests.support.ranks import on_ranks
from tests.support.seq2seq import seq2seq_inputs, tiny_seq2seq

DRAWS = int(os.environ.get("ADX_RANDOM_CALLS", "1"))
MESH = Mesh(tp=2)
TOKENS = 9
TOLERANCE = 1e-6  # most of them compute norms and losses in float32
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    **{
        name: (lambda name=name: tiny_model(name, num_hidden_layers=1, n_layer=1))  # type: ignore[misc]
        for name in ("gpt2", "opt", "biogpt", "llama", "qwen2", "mistral", "phi3", "gpt_neox", "gemma")
    },
    "roberta-prelayernorm": lambda: tiny_model("roberta-prelayernorm", num_hidden_layers=1, is_decoder=True),
    **{
        name: (lambda name=name: tiny_moe_model(name, num_hidden_layers=1))  # type: ignore[misc]
        for name in ("mixtral", "qwen3_moe")
    },
    **{name: (lambda name=name: tiny_seq2seq(name, layers=1)) for name in ("bart", "t5")},  # type: ignore[misc]
}


def _mask(draw: random.Random, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """None, of ones, padded on the left, or on the right."""
    mask = torch.ones(rows, tokens, dtype=torch.long)
    kind = draw.choice(("none", "ones", "left", "right"))
    if kind == "left":
        mask[0, : draw.randint(1, 3)] = 0
    elif kind == "right":
        mask[0, -draw.randint(1, 3) :] = 0
    return {} if kind == "none" else {"attention_mask": mask}


def _argument(draw: random.Random, model: PreTrainedModel) -> dict[str, Any]:
    """None, or one that is no tensor."""
    choices: list[dict[str, Any]] = [{}, {"output_hidden_states": True}]
    takes = inspect.signature(model.forward).parameters
    if hasattr(model.config, "output_router_logits"):
        choices.append({"output_router_logits": True})
    if "logits_to_keep" in takes and not model.config.is_encoder_decoder:
        choices.append({"logits_to_keep": draw.randint(1, 3)})
    return draw.choice(choices)


def drawn_call(draw: random.Random, model: PreTrainedModel) -> dict[str, Any]:
    """The arguments of a call, as they come. Some tokens are padding, whatever the mask says."""
    ids = torch.randint(3, 100, (2, TOKENS), generator=torch.Generator().manual_seed(draw.randint(0, 999)))
    if draw.random() < 0.5:
        ids[0, 0] = model.config.pad_token_id
    if model.config.is_encoder_decoder:
        given = seq2seq_inputs(model)
        target = given["decoder_input_ids"]
        decoder = draw.choice(({"decoder_input_ids": target}, {"labels": target}))
        return {"input_ids": ids, **_mask(draw, 2, TOKENS), **decoder, **_argument(draw, model)}
    call: dict[str, Any] = {"input_ids": ids, **_mask(draw, 2, TOKENS)}
    if draw.random() < 0.35:
        tokens = torch.tensor([[7, 5], [11, 13]])
        return {**call, "use_cache": True, "next": {"input_ids": tokens}}
    if draw.random() < 0.5 and "position_ids" in inspect.signature(model.forward).parameters:
        first = draw.randint(2, TOKENS - 2)
        rows = torch.cat([torch.arange(first), torch.arange(TOKENS - first)])
        call["position_ids"] = rows.expand(2, TOKENS).contiguous()
    argument = _argument(draw, model)
    if draw.random() < 0.5 and "logits_to_keep" not in argument:
        call["labels"] = ids
    return {**call, **argument}


def _answer(model: Any, call: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor that was asked for; with a cache, the last position's logits, which is all that ranks give then, and
    those of a step that goes on with it."""
    call = dict(call)
    step = call.pop("next", None)
    outputs = model(**call)
    if step is not None:
        if (mask := call.get("attention_mask")) is not None:
            step = {**step, "attention_mask": torch.cat([mask, torch.ones_like(step["input_ids"])], dim=1)}
        after = model(**step, **{CACHE_FIELD: cache_of(outputs)}, use_cache=True)
        return {"logits": outputs.logits[:, -1:], "next logits": after.logits[:, -1:]}
    found = {}
    for name, value in outputs.items():
        if name != "past_key_values":
            tensors = [value] if isinstance(value, torch.Tensor) else value
            found.update({f"{name}.{i}": tensor for i, tensor in enumerate(tensors)})
    return found


def _assert_alike(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], call: dict[str, Any]) -> None:
    said = {name: tuple(x.shape) if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    assert got.keys() == wanted.keys(), said
    for name, value in wanted.items():
        assert got[name].shape == value.shape and relative_error(got[name], value) <= TOLERANCE, (name, said)


@pytest.mark.drawn(2)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_drawn_calls(family: str) -> None:
    model, draw = FAMILIES[family](), random.Random(f"{family} {DRAWS}")
    calls = [drawn_call(draw, model) for _ in range(DRAWS)]
    wanted = [_answer(model, {"use_cache": False, **call}) for call in calls]
    compiled = adx.compile(model, tp=MESH.tp, verify=False)
    for call, truth in zip(calls, wanted, strict=True):
        _assert_alike(_answer(compiled.simulate, call), truth, call)
    for found in on_ranks(model, MESH, lambda split: [_answer(split, call) for call in calls]):
        for call, got, truth in zip(calls, found, wanted, strict=True):
            _assert_alike(got, truth, call)
