"""One generation on the rank that leads and on one that follows: guards, masks and positions, streamers, ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import autodist_fx as adx
from autodist_fx.calls.cache_names import CACHE_FIELD
from autodist_fx.calls.lengths import Lengths
from autodist_fx.errors import AutodistError, CommunicationError
from autodist_fx.runtime.cache.cache_table import CacheTable
from autodist_fx.runtime.cache.kv_cache import SplitCache
from autodist_fx.runtime.comm.alone_communicator import AloneCommunicator
from autodist_fx.runtime.generation.causal_lm import DistributedCausalLM
from autodist_fx.runtime.generation.follower import Follower
from autodist_fx.runtime.generation.guarded_programs import GuardedPrograms
from autodist_fx.runtime.generation.leader import GrowingMask
from autodist_fx.runtime.generation.step import Step
from autodist_fx.runtime.generation.step_messages import (
    CropMessage,
    EndMessage,
    Message,
    OutputKind,
    PrepareMessage,
    ReorderMessage,
    StepMessage,
)
from autodist_fx.runtime.generation.step_runner import RunnerParts
from autodist_fx.runtime.microbatches.bounded_sends import BoundedSends
from autodist_fx.simulation.thread_communicator import ThreadWorld
from autodist_fx.weights.load import load_rank
from autodist_fx.weights.sources.module_source import ModuleSource
from tests.support.models import tiny_model

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
END = EndMessage(OutputKind.SEQUENCES, torch.tensor([[5, 6], [8, 9]]))


class CountingGuards:
    """Guards that hold for all lengths, and note for which they were asked."""

    def __init__(self) -> None:
        self.asked: list[Lengths] = []

    def violated(self, lengths: Lengths) -> list[str]:
        self.asked.append(dict(lengths))
        return []


@pytest.mark.parametrize("mesh", [{"tp": 1, "pp": 1}, {"tp": 1, "pp": 2}], ids=str)
def test_guards_are_evaluated_once_a_step_on_every_rank(mesh: dict[str, int]) -> None:
    model = tiny_model("gpt2")
    compiled = adx.compile(model, **mesh, use_cache=True)
    buffers = dict(compiled.graph.named_buffers(remove_duplicate=False))

    def work(rank: int, communicator: Any) -> list[Lengths]:
        program, guards = compiled.program(rank), CountingGuards()
        load_rank(program, ModuleSource(model), buffers=buffers, base_model_prefix=model.base_model_prefix)
        programs: Any = GuardedPrograms([(guards, program)])  # type: ignore[list-item]
        split = DistributedCausalLM(RunnerParts(program, communicator, model.config), programs)
        split.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
        return guards.asked

    expected = [{"B": 2, "S": 3, "P": 0, "T": 3}, {"B": 2, "S": 1, "P": 3, "T": 4}, {"B": 2, "S": 1, "P": 4, "T": 5}]
    assert ThreadWorld(compiled.mesh).run(work) == [expected] * compiled.mesh.size


def test_positions_count_from_the_first_token_that_is_no_padding() -> None:
    growing, mask = GrowingMask(), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    for step in range(4):
        rows = mask.tolist()
        counted = [[sum(row[: at + 1]) - 1 if shown else 1 for at, shown in enumerate(row)] for row in rows]
        tokens = mask.shape[1] if step == 0 else 1
        assert growing.positions(mask, cached=step > 0)[:, -tokens:].tolist() == [row[-tokens:] for row in counted]
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        growing.grow(mask)
    other = mask.flip(0)  # one that transformers did not grow: counted anew
    assert growing.positions(other, cached=True)[:, -1].tolist() == [6, 7, 5]


class Heard:
    """A channel on which messages are waiting."""

    def __init__(self, *messages: Message) -> None:
        self._messages = [type(message).unpack(message.pack()) for message in messages]

    def hear(self) -> Message:
        return self._messages.pop(0)


class Ran:
    """A rank's share of a model that notes the steps it is to run."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.caches, self.steps, self.prepared = CacheTable(self._empty), list[Step](), list[Lengths]()

    def _empty(self) -> SplitCache:
        return SplitCache()

    def run_step(self, step: Step) -> None:
        self.steps.append(step)

    def prepare(self, lengths: Lengths) -> None:
        self.prepared.append(lengths)
        raise AutodistError("no program for these lengths")

    def encoded_of(self, number: int) -> None:
        assert not number


def follow(model: Ran, *messages: Message, **options: Any) -> Any:
    follower = Follower(model, Heard(*messages), (dict, dict), **options)  # type: ignore[arg-type]
    return follower.follow(BoundedSends(AloneCommunicator()))


def step(cache: int = 1, at: int = 0, ids: torch.Tensor = IDS, **fields: Any) -> StepMessage:
    return StepMessage(cache, at, ids, cache_kept=True, **fields)


def test_a_mask_of_ones_is_not_sent() -> None:
    model = Ran()
    model.caches.numbered(1)
    follow(model, step(mask_of_ones=True), step(at=3, ids=IDS[:, :1], mask_grown=True), END)
    assert [s.attention_mask.tolist() for s in model.steps] == [[[1] * n] * 2 for n in (3, 4)]  # type: ignore[union-attr]


def test_a_mask_is_sent_once_and_grows() -> None:
    model, mask, one = Ran(), torch.tensor([[0, 1, 1], [1, 1, 1]]), IDS[:, :1]
    grown = step(at=3, ids=one, position_ids=one + 1, mask_grown=True)
    follow(model, step(attention_mask=mask, position_ids=IDS + 1), grown, END)
    first, second = model.steps
    assert first.attention_mask is not None and first.attention_mask.tolist() == mask.tolist()
    assert second.attention_mask is not None and second.attention_mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert second.position_ids is not None and second.position_ids.tolist() == [[6], [9]]
    assert second.cache_position.tolist() == [3] and second.cache is first.cache
    with pytest.raises(CommunicationError, match="the mask of cache 2 grows, and was never sent"):
        follow(model, step(cache=2, mask_grown=True), END)


class Streamer:
    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.got.append("end")


@pytest.mark.parametrize("prompt", [None, torch.tensor([[1, 2]])])
def test_a_streamer_gets_the_prompt_then_each_new_token_once(prompt: torch.Tensor | None) -> None:
    streamer, rows = Streamer(), IDS[:1]
    again = step(ids=rows, at=3, new_tokens=False)  # a second pass without a token, of guidance say
    messages = step(ids=rows), step(ids=rows[:, 1:2], at=3, new_tokens=True), again, END
    follow(Ran(), *messages, streamer=streamer, prompt=prompt)
    assert streamer.got == [rows.tolist() if prompt is None else [[1, 2]], [6], [6, 9], "end"]


def test_it_ends_as_the_leader_does() -> None:
    model = Ran()
    assert follow(model, END).tolist() == END.sequences.tolist()
    for kind in (OutputKind.SAMPLE, OutputKind.BEAMS):
        output = follow(model, step(), EndMessage(kind, END.sequences, cache=1))
        assert output["sequences"].tolist() == END.sequences.tolist()
        assert output[CACHE_FIELD] is not None and output[CACHE_FIELD].number == 1


def test_an_error_of_preparing_is_the_leaders() -> None:
    model = Ran()
    follow(model, PrepareMessage({"B": 1, "S": 4}), END)
    assert model.prepared == [{"B": 1, "S": 4}]


def test_caches_change_as_the_leaders_do() -> None:
    model = Ran()
    cache = model.caches.new()
    cache.update(torch.arange(12.0).view(3, 1, 4, 1), torch.zeros(3, 1, 4, 1), 0)
    cache.tokens = 4
    follow(model, ReorderMessage(cache.number, torch.tensor([2, 0, 0])), CropMessage(cache.number, -1), END)
    assert cache.read(0)[0].flatten().tolist() == [8, 9, 10, 0, 1, 2, 0, 1, 2]
    assert cache.tokens == 3
