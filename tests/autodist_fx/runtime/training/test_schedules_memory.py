"""Ranks keep between the actions of a schedule what the timeline says, and at most a message more."""

from __future__ import annotations

import pytest
import torch

from autodist_fx.runtime.training.rank_trainer import RankTrainer
from autodist_fx.runtime.training.schedules import make_schedule
from autodist_fx.runtime.training.stage import Microbatch
from autodist_fx.simulation.thread_communicator import ThreadCommunicator, ThreadWorld
from cost_model.mesh import Mesh
from cost_model.schedule.schedule import Schedule
from cost_model.schedule.timeline import StageCosts, chain, simulate
from tests.support.models import tiny_model
from tests.support.training.gradients import compiled_for_training
from tests.support.training.live_bytes import LiveBytes
from tests.support.training.one_process import adamw, text
from tests.support.training.transports import KeepsSends, Posts

STAGES = 3


@pytest.fixture(scope="module")
def compiled():
    model = tiny_model("llama", torch.float32, num_hidden_layers=STAGES)
    batch = text(2, 16, 0)
    made = compiled_for_training(model, batch, (1, STAGES), verify=False)
    made.gradients(**batch)  # loads the weights
    return made, batch


def kept(compiled, batch, schedule: Schedule, recompute: str) -> list[list[int]]:
    """The bytes that each rank has before each of its actions but the first, and at the end."""
    world = ThreadWorld(Mesh(1, STAGES))
    posts = Posts(world)

    def work(rank: int, communicator: ThreadCommunicator) -> list[int]:
        own = {rank: compiled.main.programs[rank]}
        trainer = RankTrainer(world.mesh, rank, own, compiled.source.trained_parameters(), adamw, recompute=recompute)
        found: list[int] = []
        with LiveBytes() as live:
            keeps = KeepsSends(posts, communicator, lambda _: found.append(live.now), live.of_others)
            trainer.step(keeps, schedule, [Microbatch(batch, own, compiled.plan.hops)] * schedule.microbatches)
        return found[1:]

    return world.run(work)


@pytest.mark.drawn(1)
@pytest.mark.parametrize(("name", "recompute"), [("gpipe", "none"), ("1f1b", "none"), ("1f1b", "layers")])
def test_ranks_keep_what_the_timeline_says(compiled, name: str, recompute: str) -> None:
    made, batch = compiled
    message = batch["input_ids"].numel() * made.config.hidden_size * torch.float32.itemsize
    one = [own[0] for own in kept(made, batch, make_schedule("gpipe", STAGES, 1), recompute)]  # behind the forward pass
    schedule = make_schedule(name, STAGES, 6)
    timeline = simulate(schedule, [StageCosts(1, 1, 1, activation_bytes=nbytes) for nbytes in one], chain(STAGES))
    for rank, own in enumerate(kept(made, batch, schedule, recompute)):
        more = max(own[:-1]) - timeline.rank_activation_bytes[rank]
        assert more in (0, message), (rank, own)  # the gradient that the last action sent
    if recompute == "layers":
        assert one[1] < 4 * message, one  # the middle stage has one layer: its input, masks, rotary tables
