"""Every schedule gives the gradients of eager transformers, summed over microbatches: with several stages a rank, with
backward passes in two parts, and with values that are needed two stages on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from autodist_fx.api.compiled_model import CompiledModel
from autodist_fx.runtime.training.rank_trainer import RankTrainer
from autodist_fx.runtime.training.schedules import make_schedule
from autodist_fx.runtime.training.stage import Microbatch
from autodist_fx.simulation.backward import glued
from autodist_fx.simulation.thread_communicator import ThreadCommunicator, ThreadWorld
from cost_model.mesh import Mesh
from cost_model.schedule.schedule import Schedule
from passes.verify.schedule import verify_schedule
from tests.support.float64 import in_float64
from tests.support.models import tiny_model
from tests.support.seq2seq import tiny_seq2seq
from tests.support.training.gradients import compiled_for_training, eager_gradients, gradient_errors
from tests.support.training.one_process import NO_DROPOUT, text
from tests.support.training.transports import Posts, WithoutChannels

SCHEDULES = [
    make_schedule("gpipe", 4, 3),
    make_schedule("1f1b", 4, 4),
    make_schedule("interleaved_1f1b", 2, 4, 2),
    make_schedule("interleaved_1f1b", 1, 2, 4),
    make_schedule("interleaved_zero_bubble", 4, 4, 1),
    make_schedule("interleaved_zero_bubble", 2, 2, 2),
    make_schedule("zbv_zero_bubble", 2, 4),
]
Batch = dict[str, torch.Tensor]


class Recorder(torch.optim.SGD):
    """Keeps the gradients that it gets, and steps nothing."""

    def step(self) -> None:  # type: ignore[override]
        parameters = (p for group in self.param_groups for p in group["params"])
        self.seen = {id(p): p.grad.clone() for p in parameters if p.grad is not None}


def gradients_of(compiled: CompiledModel, schedule: Schedule, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """Runs a step on a mesh of as many pipeline ranks as the schedule has, over a transport without channels."""
    programs = list(compiled.main.programs.values())
    mesh = Mesh(compiled.mesh.tp, schedule.ranks)
    world = ThreadWorld(mesh)
    posts = Posts(world)

    def work(rank: int, communicator: ThreadCommunicator) -> dict[int, dict[str, torch.Tensor]]:
        pp_rank, t = mesh.coordinates(rank)
        own = {stage: programs[compiled.mesh.rank(stage, t)] for stage in schedule.stages_of(pp_rank)}
        trainer = RankTrainer(mesh, rank, own, compiled.source.trained_parameters(), Recorder)
        parts = [Microbatch(batch, own, compiled.plan.hops) for batch in batches]
        trainer.step(WithoutChannels(posts, communicator), schedule, parts)
        seen = trainer.optimizer.torch_optimizer.seen  # type: ignore[union-attr]
        return {
            p.rank: {path: seen[id(x)] for path, x in p.graph_module.named_parameters() if id(x) in seen}
            for p in own.values()
        }

    by_program: dict[int, dict[str, torch.Tensor]] = {}
    for found in world.run(work):
        by_program |= found
    return glued(programs, [by_program[p.rank] for p in programs])


def check(model: PreTrainedModel, batches: Sequence[Batch], mesh: tuple[int, int], **options: Any) -> CompiledModel:
    """Compares all schedules with the model itself, over as many of the batches as a schedule has microbatches."""
    compiled = compiled_for_training(model, dict(batches[0]), mesh, verify=False, **options)
    compiled.gradients(**batches[0])  # loads the weights
    each = [eager_gradients(model, batch) for batch in batches]
    names = compiled.source.trained_parameters()
    for schedule in SCHEDULES:
        count = schedule.microbatches
        verify_schedule([list(compiled.main.programs.values())] * count, schedule)
        got = gradients_of(compiled, schedule, batches[:count])
        got = {names[name]: gradient for name, gradient in got.items()}
        wanted = {name: sum(gradients[name] for gradients in each[:count]) for name in each[0]}
        assert got.keys() == wanted.keys(), schedule.name
        wrong = {name: error for name, error in gradient_errors(got, wanted).items() if not error <= 1e-9}
        assert not wrong, (schedule.name, wrong)
    return compiled


def test_a_decoder_whose_embedding_is_tied_over_stages() -> None:
    with in_float64():
        model = tiny_model("llama", tie_word_embeddings=True, **NO_DROPOUT)
        check(model, [text(2, 7 + seed % 2, seed) for seed in range(4)], (2, 4))


def test_an_encoder_whose_output_is_needed_two_stages_on() -> None:
    with in_float64():
        batches = [{**text(2, 7, seed), "labels": text(2, 5, seed + 50)["labels"]} for seed in range(4)]
        cuts = ["encoder.block.1", "decoder.block.0", "decoder.block.1"]
        compiled = check(tiny_seq2seq("t5", **NO_DROPOUT), batches, (1, 4), cuts=cuts)
    assert {(1, 2), (1, 3)} <= {(hop.source, hop.target) for hop in compiled.plan.hops}
