"""`model(...)` in microbatches over stages gives what the unsplit model gives; what cannot be divided runs in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, PreTrainedModel

from autodist_fx.errors import AutodistError
from cost_model.mesh import Mesh
from tests.support.models import padded_batch, randomized, relative_error, tiny_model
from tests.support.moe import tiny_moe_model
from tests.support.ranks import on_ranks

IDS, MASK = padded_batch(5, 9)


def tiny_bert() -> PreTrainedModel:
    config = BertConfig(
        vocab_size=128, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=80
    )
    return randomized(BertLMHeadModel(config).double().eval())


@pytest.mark.drawn(1)
@pytest.mark.parametrize(
    "make, mesh, tolerance",
    [
        (lambda: tiny_model("llama"), Mesh(pp=2), 1e-6),  # it computes norms in float32
        (lambda: tiny_model("gpt2", n_layer=3), Mesh(pp=3), 1e-9),
        (lambda: tiny_model("gpt2"), Mesh(tp=2, pp=2), 1e-9),
        (lambda: tiny_model("gemma2"), Mesh(pp=2), 1e-6),
        (lambda: tiny_moe_model("mixtral"), Mesh(pp=2), 1e-6),
        (tiny_bert, Mesh(pp=2), 1e-9),
    ],
    ids=["llama", "three stages", "tp2 pp2", "sliding windows", "mixtral", "bert"],
)
@torch.no_grad()
def test_outputs_are_the_models(make: Callable[[], PreTrainedModel], mesh: Mesh, tolerance: float) -> None:
    model = make()
    calls: list[dict[str, Any]] = [{"attention_mask": MASK, "output_hidden_states": True}]
    wanted = [model(input_ids=IDS, use_cache=False, **call) for call in calls]

    def work(split: Any) -> Any:
        found = [split(input_ids=IDS, microbatches=3, **call) for call in calls]
        return found, split.in_flight

    for found, in_flight in on_ranks(model, mesh, work):
        if "selected" not in in_flight.why:  # 4.57's experts mix rows
            assert in_flight.count == 3, in_flight
        for one, truth in zip(found, wanted, strict=True):
            for name, value in one.items():
                several = isinstance(value, tuple)
                for mine, right in zip(*(value, truth[name]) if several else ((value,), (truth[name],)), strict=True):
                    shown = MASK.bool() & ~right.isnan().any(-1)  # Gemma 2's own, in a row that is padded
                    assert mine.shape == right.shape and int(shown.sum()) >= 4 * 9
                    assert relative_error(mine[shown], right[shown]) <= tolerance


@torch.no_grad()
def test_what_mixes_rows_runs_in_one_and_says_why() -> None:
    """A loss is one of all rows; and the count is counted: more microbatches than rows, one row, none."""
    model = tiny_model("gpt2")
    loss = model(input_ids=IDS, labels=IDS).loss
    positions = torch.arange(9)[None]
    logits = model(input_ids=IDS, position_ids=positions + 1).logits

    def work(split: Any) -> Any:
        seen = []
        outputs = [split(input_ids=IDS, labels=IDS, microbatches=2)]
        seen.append(split.in_flight)
        outputs.append(split(input_ids=IDS, position_ids=positions + 1, microbatches=8))
        seen.append(split.in_flight)
        outputs.append(split(input_ids=IDS[:1], position_ids=positions + 1, microbatches=8))
        seen.append(split.in_flight)
        with pytest.raises(AutodistError, match="microbatches='many' is neither"):
            split(input_ids=IDS, microbatches="many")
        with pytest.raises(AutodistError, match="microbatches=0 is neither"):
            split.microbatches = 0
        return outputs, seen

    for outputs, seen in on_ranks(model, Mesh(pp=2), work):
        assert relative_error(outputs[0].loss, loss) <= 1e-6
        assert relative_error(outputs[1].logits, logits) <= 1e-9
        assert relative_error(outputs[2].logits, logits[:1]) <= 1e-9
        assert [each.count for each in seen] == [1, 5, 1]
        assert "loss" in seen[0].why and seen[2].why == "one row"
