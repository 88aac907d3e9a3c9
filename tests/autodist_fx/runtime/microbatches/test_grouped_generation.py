"""generate in groups of rows over stages gives the tokens of one process, whole batch; so does generate_many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.generation import BaseStreamer

from autodist_fx.errors import AutodistError
from cost_model.mesh import Mesh
from tests.support.models import tiny_model
from tests.support.moe import tiny_moe_model
from tests.support.ranks import on_ranks

GENERATOR = torch.Generator().manual_seed(3)
IDS = torch.randint(3, 100, (5, 6), generator=GENERATOR)
MASK = torch.ones_like(IDS)
MASK[0, :3] = MASK[3, :1] = 0
BATCH = {"input_ids": IDS.masked_fill(MASK == 0, 0), "attention_mask": MASK, "pad_token_id": 0}


def ending(model: PreTrainedModel) -> int:
    """A token with which some rows of BATCH end early, and at different places."""
    rows = model.generate(**BATCH, do_sample=False, max_new_tokens=12, eos_token_id=None)[:, IDS.shape[1] :].tolist()
    places = {t: [row.index(t) if t in row else 12 for row in rows] for t in {t for row in rows for t in row}}
    found = max(places, key=lambda t: len(set(places[t])))
    assert len(set(places[found])) > 1
    return found


@pytest.mark.drawn(1)
@pytest.mark.parametrize(
    "make, mesh",
    [
        (lambda: tiny_model("llama"), Mesh(pp=2)),
        (lambda: tiny_model("gpt2", n_layer=3), Mesh(pp=3)),
        (lambda: tiny_model("gpt2"), Mesh(tp=2, pp=2)),
        (lambda: tiny_model("gemma2"), Mesh(pp=2)),
        (lambda: tiny_moe_model("mixtral"), Mesh(pp=2)),
    ],
    ids=["llama", "three stages", "tp2 pp2", "sliding windows", "mixtral"],
)
@torch.no_grad()
def test_tokens_are_those_of_the_whole_batch(make: Callable[[], PreTrainedModel], mesh: Mesh) -> None:
    model = make()
    eos = ending(model)
    calls: list[dict[str, Any]] = [
        {"do_sample": False, "max_new_tokens": 12, "eos_token_id": eos},
        {"do_sample": False, "max_new_tokens": 5, "eos_token_id": eos, "num_beams": 3, "num_return_sequences": 2},
    ]
    wanted = [model.generate(**BATCH, **call) for call in calls]

    def work(split: Any) -> Any:
        return [(split.generate(**BATCH, **call, microbatches=3), split.in_flight) for call in calls]

    for rank, found in enumerate(on_ranks(model, mesh, work)):
        for (sequences, in_flight), truth in zip(found, wanted, strict=True):
            assert torch.equal(sequences, truth)
            if rank == mesh.size - mesh.tp and "selected" not in in_flight.why:  # 4.57's experts mix rows
                assert in_flight.count == 3, in_flight


class Columns(BaseStreamer):
    def __init__(self) -> None:
        self.columns: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.columns.append(value.tolist())

    def end(self) -> None:
        self.columns.append("end")


@torch.no_grad()
def test_many_batches_streamers_samples_and_errors() -> None:
    """As generate of each alone; an error of one group is everyone's, and the next call is right."""
    model = tiny_model("gpt2")
    padded = {"input_ids": IDS[:4, 1:5], "attention_mask": MASK[:4, 1:5]}
    batches = [IDS[:2], {"input_ids": IDS[2:3, 2:]}, IDS[4], padded]
    options = {"do_sample": False, "max_new_tokens": 7, "pad_token_id": 0, "eos_token_id": ending(model)}
    singly = [{"inputs": torch.atleast_2d(b)} if isinstance(b, torch.Tensor) else b for b in batches]
    wanted = [model.generate(**given, **options) for given in singly]
    whole = model.generate(**BATCH, do_sample=False, max_new_tokens=4)
    streamed = Columns()
    for row in (whole[:, :6], *whole[:, 6:].unbind(1)):
        streamed.put(row)
    streamed.end()

    def work(split: Any) -> Any:
        found = [split.generate_many(batches, microbatches=2, **options)]
        found.append(split.generate_many(batches, **options))
        with pytest.raises(AutodistError, match="input_ids holds 100"):  # of the last group
            split.generate(torch.cat([IDS, IDS[:1] + 10_000]), do_sample=False, max_new_tokens=3, microbatches=3)
        streamer = None if split.is_driver else Columns()
        tokens = split.generate(**BATCH, do_sample=False, max_new_tokens=4, microbatches=2, streamer=streamer)
        torch.manual_seed(5)
        samples = [split.generate(**BATCH, do_sample=True, top_k=0, max_new_tokens=6, microbatches=2) for _ in range(2)]
        with pytest.raises(AutodistError, match="return_dict_in_generate is of the whole batch"):
            split.generate_many(batches, return_dict_in_generate=True)
        return found, tokens, None if streamer is None else streamer.columns, samples

    for found, tokens, columns, samples in on_ranks(model, Mesh(pp=2), work):
        for several in found:
            assert all(torch.equal(a, b) for a, b in zip(several, wanted, strict=True)) and len(several) == len(wanted)
        assert torch.equal(tokens, whole)
        assert columns is None or columns == streamed.columns
        assert not torch.equal(*samples) and samples[0].shape == samples[1].shape == (5, 12)
