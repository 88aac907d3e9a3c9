"""A rank that is killed in any phase of a training step ends all others by name, and the run goes on from its last save
with the bits of one that was never interrupted."""

from __future__ import annotations

import functools
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import autodist_fx as adx
from autodist_fx.runtime.comm.dist_communicator import DistCommunicator
from autodist_fx.runtime.generation.collective_call import CollectiveCalls
from autodist_fx.runtime.training import rank_trainer, stage
from autodist_fx.runtime.training.autograd import recompute
from autodist_fx.runtime.training.flat_weights import FlatWeights
from autodist_fx.runtime.training.gradient_buckets import GradientBuckets
from autodist_fx.runtime.training.optimizer import ShardOptimizer
from autodist_fx.runtime.training.posted_receives import PostedReceives
from autodist_fx.runtime.training.stage import StagePasses
from autodist_fx.training.engine import Engine
from autodist_fx.training.gathered import TrainingState
from passes.ops.comm_autograd import AllReduce, CopyToTp
from tests.support.forked import exits
from tests.support.models import tiny_model
from tests.support.training.one_process import adamw, text

pytestmark = pytest.mark.distributed

CONFIGS: dict[str, dict[str, Any]] = {
    "pp": {"pp": 2, "microbatches": 4, "recompute": "layers"},
    "split": {"pp": 2, "microbatches": 4, "schedule": "interleaved_zero_bubble", "stages_per_rank": 1},
    "tp": {"tp": 2, "microbatches": 2},
    "dp": {"dp": 2, "microbatches": 2, "zero_stage": 1},
}
BATCHES = [text(8, 9, step) for step in (0, 1)]


@dataclass(frozen=True, slots=True)
class Point:
    """Rank `rank` of a run is killed before, or with `after` behind, the call number `number` of `owner.name` in its
    second step."""

    phase: str
    config: str
    rank: int
    owner: Any = field(repr=False)
    name: str
    number: int = 1
    after: bool = False

    def arm(self) -> None:
        """Sets the trap, in this process."""
        right, calls = getattr(self.owner, self.name), 0

        @functools.wraps(right)
        def trapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.number and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = right(*args, **kwargs)
            if calls == self.number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        is_static = isinstance(vars(self.owner).get(self.name), staticmethod)
        setattr(self.owner, self.name, staticmethod(trapped) if is_static else trapped)


POINTS = [
    Point("before the first forward pass", "pp", 0, StagePasses, "forward"),
    Point("between forward passes, one on its way", "pp", 0, StagePasses, "forward", 2),
    Point("in a forward pass, in a layer", "pp", 1, recompute.RecomputedLayer, "forward"),
    Point("behind a receive that was posted", "pp", 1, PostedReceives, "post", after=True),
    Point("behind a receive that was waited for", "pp", 1, PostedReceives, "take", 2, after=True),
    Point("between forward and backward", "pp", 1, StagePasses, "backward"),
    Point("in a backward pass, before a layer is computed again", "pp", 0, recompute, "using"),
    Point("in a later backward pass, while a layer is computed again", "pp", 1, recompute, "using", 2, after=True),
    Point("when a gradient has been sent back", "pp", 1, stage, "go_back", after=True),
    Point("while gradients of microbatches are added up", "pp", 0, GradientBuckets, "add", 5),
    Point("in the last backward pass", "pp", 0, StagePasses, "backward", 4),
    Point("before the gradients of input are sent back alone", "split", 1, StagePasses, "backward_input", 2),
    Point("between the two parts of a backward pass", "split", 0, StagePasses, "backward_weight"),
    Point("before sums over stages", "pp", 0, rank_trainer, "pay_sums_of"),
    Point("behind sums over stages", "pp", 1, rank_trainer, "pay_sums_of", after=True),
    Point("before the norm", "pp", 1, rank_trainer, "total"),
    Point("behind the norm", "tp", 0, rank_trainer, "total", after=True),
    Point("before clipping", "tp", 1, rank_trainer, "clip"),
    Point("before the optimizer", "tp", 0, ShardOptimizer, "step"),
    Point("behind the optimizer", "dp", 1, ShardOptimizer, "step", after=True),
    Point("in a sum of a forward pass", "tp", 1, AllReduce, "forward", 2),
    Point("in a sum of a backward pass", "tp", 0, CopyToTp, "backward", 2),
    Point("when a bucket's sum over replicas has begun", "dp", 0, DistCommunicator, "start_reduce_scatter", after=True),
    Point("before replicas know the sums", "dp", 1, GradientBuckets, "whole"),
    Point("before the stepped parts are exchanged", "dp", 0, FlatWeights, "gather"),
    Point("while the stepped parts are exchanged", "dp", 1, DistCommunicator, "start_all_gather", after=True),
    Point("when the step has been taken, before all know", "tp", 1, Engine, "_step", after=True),
    Point("before the step, while all compare their batches", "dp", 0, CollectiveCalls, "_begin"),
]  # fmt: skip


def engine(config: str, **how: Any) -> Engine:
    """A GPT-2 of two layers with dropout, whose tables are tied over stages."""
    model = tiny_model("gpt2", torch.float32)
    return adx.train(model, optimizer=adamw, max_grad_norm=0.5, verify=False, **CONFIGS[config], **how)


@functools.cache
def uninterrupted(config: str) -> list[TrainingState]:
    """The states after each of two steps."""
    whole, states = engine(config, simulate=True), []
    for batch in BATCHES:
        whole.step(batch)
        states.append(whole.gather())
    return states


def same(a: TrainingState, b: TrainingState) -> bool:
    pairs = [(a.parameters[name], b.parameters[name]) for name in a.parameters]
    pairs += [(a.optimizer[name][key], b.optimizer[name][key]) for name in a.optimizer for key in a.optimizer[name]]
    return a.optimizer.keys() == b.optimizer.keys() and all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.drawn(1)
@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.phase)
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(point: Point, tmp_path: Path) -> None:
    saved = tmp_path / "run"

    def work(rank: int) -> None:
        run = engine(point.config, device="cpu", timeout=60)
        run.step(BATCHES[0])
        run.save(saved)
        if rank == point.rank:
            point.arm()
        run.step(BATCHES[1])

    found = exits(2, work, tmp_path)
    other = 1 - point.rank
    assert found[point.rank][0] == -signal.SIGKILL, found
    assert found[other][0] > 0 and f"rank {point.rank} died without a word" in found[other][1], found
    resumed = engine(point.config, simulate=True)
    assert resumed.load(saved).step == 1
    resumed.step(BATCHES[1])
    assert same(resumed.gather(), uninterrupted(point.config)[1])
