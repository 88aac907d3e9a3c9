"""A model in memory that changes after its ranks got their weights, and before a graph that they still lack is made."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from autodist_fx.errors import AutodistError
from cost_model.mesh import Mesh
from tests.support.models import padded_batch, relative_error, relative_tolerance, tiny_model
from tests.support.moe import tiny_moe_model
from tests.support.ranks import on_ranks

IDS, MASK = padded_batch(2, 9)


def _unseen(model: Any) -> None:
    """One row of a table that is split over ranks, behind autograd's back: one rank alone has it."""
    model.get_input_embeddings().weight.data[-1].mul_(2)


_CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "one row": (_unseen, r"model\.embed_tokens\.weight"),
    "training": (lambda model: model.train(), "its adapters, layers, mode or config"),
    "a buffer": (lambda model: model.model.rotary_emb.inv_freq.mul_(2), "its buffers"),
}


@pytest.mark.drawn(1)
@pytest.mark.parametrize("change", _CHANGES)
def test_a_graph_that_is_made_after_a_change_is_refused_on_every_rank(change: str) -> None:
    model = tiny_model("llama")
    truth = model(input_ids=IDS, attention_mask=MASK).logits
    alter, named = _CHANGES[change]
    altered: list[Any] = []  # once, by whoever comes first: both have made the first graph by then
    embeddings = torch.zeros(2, 9, model.config.hidden_size, dtype=torch.float64)

    def work(split: Any) -> tuple[torch.Tensor, list[str]]:
        before, refused = split(input_ids=IDS, attention_mask=MASK, use_cache=False).logits, []
        if not altered:
            altered.append(alter(model))
        for _ in range(2):
            with pytest.raises(AutodistError) as error:
                split(inputs_embeds=embeddings, attention_mask=MASK, use_cache=False)
            refused.append(str(error.value))
        return before, refused

    for before, refused in on_ranks(model, Mesh(tp=2), work):
        assert relative_error(before, truth) <= relative_tolerance("llama")
        for line in refused:
            assert re.search(rf"LlamaForCausalLM is not as it was .*{named}.* call to_distributed again", line)


@torch.no_grad()
@pytest.mark.parametrize("asked", ["output_hidden_states", "output_router_logits"])
def test_a_call_of_the_model_that_captures_outputs_is_no_change(asked: str) -> None:
    """transformers 5 leaves hooks behind, and 4.57 forwards that it has put back."""
    model = tiny_moe_model("qwen3_moe", num_hidden_layers=1)
    inputs = {"input_ids": IDS, "attention_mask": MASK}

    def work(split: Any) -> torch.Tensor:
        model(**inputs, **{asked: True})
        return split(**inputs, labels=IDS).loss

    loss = model(**inputs, labels=IDS).loss
    for found in on_ranks(model, Mesh(tp=2), work):
        assert relative_error(found, loss) <= 1e-6  # softmaxes of routers are in float32
