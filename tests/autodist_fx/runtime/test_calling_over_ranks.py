"""`model(...)` over ranks: labels, embeddings, positions to keep; and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import autodist_fx as adx
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.generation.guarded_programs import only
from autodist_fx.runtime.generation.two_graphs import TwoGraphCausalLM
from autodist_fx.simulation.thread_communicator import ThreadWorld
from autodist_fx.weights.load import load_rank
from autodist_fx.weights.sources.module_source import ModuleSource
from cost_model.mesh import Mesh
from passes.program.rank_program import RankProgram
from tests.support.models import padded_batch, relative_error, tiny_model
from tests.support.ranks import on_ranks

IDS, MASK = padded_batch(2, 9)
NAMES = (("input_ids", "attention_mask"), ("inputs_embeds", "attention_mask"))
MESH = Mesh(tp=2, pp=2)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("gpt2")


@pytest.fixture(scope="module")
def programs(model: Any) -> list[dict[tuple[str, ...], RankProgram]]:
    """By rank: the graph with a cache as (), and those without by the names of their inputs."""
    made: list[dict[tuple[str, ...], RankProgram]] = [{} for _ in range(MESH.size)]
    for names in ((), *NAMES):
        compiled = adx.compile(model, tp=MESH.tp, pp=MESH.pp, use_cache=not names, input_names=names or None)
        buffers = dict(compiled.graph.named_buffers(remove_duplicate=False))
        for rank, of_rank in enumerate(made):
            of_rank[names] = compiled.program(rank)
            load_rank(of_rank[names], ModuleSource(model), buffers=buffers, base_model_prefix=model.base_model_prefix)
    return made


def _called(model: Any, programs: Any, **inputs: Any) -> list[Any]:
    def work(rank: int, communicator: Any) -> Any:
        own = programs[rank]
        split = TwoGraphCausalLM(own[()], communicator, model.config, make_program=lambda names: only(own[names]))
        with torch.no_grad():
            return split(**inputs)

    return ThreadWorld(MESH).run(work)


def _embeddings() -> torch.Tensor:
    return torch.randn(2, 9, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)},
        {"inputs_embeds": _embeddings(), "labels": IDS},
        {"input_ids": IDS, "attention_mask": MASK, "logits_to_keep": 2},
        {"input_ids": IDS, "attention_mask": MASK, "logits_to_keep": torch.tensor([1, 4])},
    ],
    ids=["labels", "embeddings", "the last two", "some positions"],
)
@torch.no_grad()
def test_every_rank_returns_what_the_model_does(model: Any, programs: Any, inputs: dict[str, Any]) -> None:
    expected = model(**inputs, use_cache=False)
    for output in _called(model, programs, **inputs):
        assert relative_error(output.logits, expected.logits) <= 1e-9
        assert (output.loss is None) == (expected.loss is None)
        if expected.loss is not None:
            assert relative_error(output.loss, expected.loss) <= 1e-6  # in float32, on either side


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"input_ids": IDS, "labels": IDS[:, :4]}, r"labels is \[2, 4\], and should be \[2, 9\]"),
        ({"input_ids": IDS, "attention_mask": MASK[:, :7]}, r"attention_mask is \[2, 7\]"),
        ({"input_ids": IDS, "labels": IDS, "use_cache": True}, "with a KV cache a distributed model takes no labels"),
        ({"input_ids": IDS, "head_mask": torch.ones(6)}, "takes no head_mask"),
        ({"input_ids": IDS, "inputs_embeds": _embeddings()}, "both input_ids and inputs_embeds|inputs_embeds is"),
    ],
)
def test_what_is_refused(model: Any, programs: Any, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(AutodistError, match=message):
        _called(model, programs, **inputs)


def test_autocast_is_refused_on_every_rank_and_the_next_call_works() -> None:
    model = tiny_model("gpt2")
    wanted = model(IDS, attention_mask=MASK).logits

    def work(split: Any) -> float:
        given = {"input_ids": IDS, "attention_mask": MASK}
        for call in (split, lambda **inputs: split.generate(**inputs, max_new_tokens=2)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                with pytest.raises(AutodistError, match=r"(forward|generate) computes .*autocast is on \(cpu\)"):
                    call(**given)
        return relative_error(split(**given).logits, wanted)

    for mesh in (Mesh(tp=2), Mesh()):
        assert max(on_ranks(model, mesh, work)) < 1e-9
