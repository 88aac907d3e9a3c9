"""Predicted bytes of a training step against what ranks hold, counted tensor by tensor while they train."""

from __future__ import annotations

import pytest
import torch

from autodist_fx.compiler.examples import planned_graph
from autodist_fx.runtime.default_hardware import default_hardware
from autodist_fx.runtime.training.rank_trainer import RankTrainer
from autodist_fx.runtime.training.schedules import make_schedule
from autodist_fx.runtime.training.stage import Microbatch
from autodist_fx.simulation.thread_communicator import ThreadCommunicator, ThreadWorld
from cost_model.mesh import Mesh
from cost_model.request.plan_options import PlanOptions
from cost_model.training.estimate import StepSetup, estimate_step
from cost_model.training.stage_work import WorkAnalysis
from tests.support.models import tiny_model
from tests.support.training.gradients import compiled_for_training
from tests.support.training.live_bytes import LiveBytes
from tests.support.training.one_process import adamw, text

ROWS, LENGTH, LAYERS = 4, 48, 4
WITHIN = 0.15  # of what is measured


@pytest.mark.parametrize(
    ("family", "tp", "pp", "schedule", "microbatches", "recompute"),
    [
        ("llama", 2, 1, "1f1b", 1, "none"),
        ("llama", 1, 2, "1f1b", 4, "none"),
        ("llama", 1, 2, "1f1b", 4, "layers"),
        ("qwen3", 1, 2, "gpipe", 4, "none"),
        ("qwen3", 2, 1, "gpipe", 1, "layers"),
        ("gpt2", 2, 1, "1f1b", 1, "none"),
        ("gpt2", 1, 2, "gpipe", 4, "layers"),
    ],
)
@pytest.mark.drawn(2)
def test_a_step_holds_what_is_predicted(
    family: str, tp: int, pp: int, schedule: str, microbatches: int, recompute: str
) -> None:
    model = tiny_model(family, torch.float32, num_hidden_layers=LAYERS, vocab_size=512)
    batch = text(ROWS, LENGTH, 0)
    made = compiled_for_training(model, batch, (tp, pp), verify=False)
    made.gradients(**batch)  # loads the weights
    mesh, order = Mesh(tp, pp), make_schedule(schedule, pp, microbatches)

    def work(rank: int, communicator: ThreadCommunicator) -> tuple[int, int, int]:
        stage = mesh.coordinates(rank)[0]
        own = {stage: made.main.programs[rank]}
        parameters = list(own[stage].graph_module.parameters())
        optimizers: list[torch.optim.Optimizer] = []

        def optimizer(named) -> torch.optim.Optimizer:
            optimizers.append(adamw(named))
            return optimizers[0]

        trainer = RankTrainer(
            mesh, rank, own, made.source.trained_parameters(), optimizer, recompute=recompute
        )
        parts = [Microbatch(batch, own, made.plan.hops)] * microbatches
        trainer.step(communicator, order, parts)  # makes the optimizer's states
        states = sum(x.nbytes for own in optimizers[0].state.values() for x in own.values() if x.dim())
        for p in parameters:
            p.grad = None
        with LiveBytes() as live:
            trainer.step(communicator, order, parts)
            return live.most, sum(p.nbytes for p in parameters), states

    measured = ThreadWorld(mesh).run(work)
    request = PlanOptions.from_keywords(tp=tp, pp=pp, sizes={"B": ROWS, "S": LENGTH}).resolve(default_hardware())
    graph = planned_graph(made.main.traced, trains=True)
    setup = StepSetup(mesh, order, ROWS, recompute)
    predicted = estimate_step(WorkAnalysis(graph, made.plan, request, ROWS, {}), setup).memory
    for stage, memory in enumerate(predicted):
        of_ranks = [measured[mesh.rank(stage, t)] for t in range(tp)]
        assert memory.gradients == max(weights for _, weights, _ in of_ranks)  # the fullest rank's
        assert memory.optimizer == max(states for _, _, states in of_ranks)
        peak = memory.gradients + memory.activations + memory.transient  # all that a step makes
        assert peak == pytest.approx(max(most for most, _, _ in of_ranks), rel=WITHIN), of_ranks
