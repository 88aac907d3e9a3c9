"""choose_training: against all ways tried one by one, and what each saving changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from autodist_fx.compiler.examples import planned_graph, traced_once
from autodist_fx.runtime.training.schedules import make_schedule
from cost_model.costs.hardware import CPU_GLOO, Hardware
from cost_model.errors import MeshError, NoPlanFits, PlanError
from cost_model.graph.op_graph import OpGraph
from cost_model.mesh import Mesh
from cost_model.request.plan_request import PlanRequest
from cost_model.search.planner import plan
from cost_model.training.choice import TrainingChoice, TrainingWishes, choose_training
from cost_model.training.estimate import StepEstimate, StepSetup, estimate_step
from cost_model.training.stage_work import WorkAnalysis
from tests.support.models import tiny_model

LENGTH, BATCH, DEVICES = 64, 8, 2
NAMES = {"model": "LlamaForCausalLM", "fingerprint": "0" * 64}


@pytest.fixture(scope="module")
def graph() -> OpGraph:
    model = tiny_model("llama", torch.float32, num_hidden_layers=2).train()
    return planned_graph(traced_once(model, False, ("input_ids", "labels"), {})[0], trains=True)


def chosen(graph: OpGraph, hardware: Hardware = CPU_GLOO, limit: int | None = None, **wishes) -> TrainingChoice:
    memory = None if limit is None else (limit,)
    request = PlanRequest(Mesh(), hardware, sizes=(("S", LENGTH),), max_memory=memory)
    return choose_training(graph, request, TrainingWishes(DEVICES, BATCH, **wishes), make_schedule, **NAMES)


def predicted(graph: OpGraph, mesh: Mesh, microbatches: int, **setup) -> StepEstimate:
    """One way, planned and predicted on its own."""
    request = PlanRequest(mesh.replica, CPU_GLOO, sizes=(("S", LENGTH), ("B", 1)))
    rows = BATCH // mesh.dp // microbatches
    analysis = WorkAnalysis(graph, plan(graph, request, **NAMES), request, rows, {})
    return estimate_step(analysis, StepSetup(mesh, make_schedule("1f1b", mesh.pp, microbatches), rows, **setup))


def test_the_best_of_all_ways(graph: OpGraph) -> None:
    choice = chosen(graph, schedule="1f1b")
    every: dict[Mesh, float] = {}
    for mesh in (Mesh(1, 1, 2), Mesh(1, 2, 1), Mesh(2, 1, 1)):
        dp, pp = mesh.dp, mesh.pp
        counts = [n for n in (1, 2, 4, 8) if n <= BATCH // dp and n >= pp]
        if counts:
            every[mesh] = min(predicted(graph, mesh, n).seconds for n in counts)
    assert [c.setup.mesh for c in choice.candidates] == sorted(every, key=lambda mesh: (every[mesh], mesh.tp))
    for c in choice.candidates:
        assert c.seconds == pytest.approx(every[c.setup.mesh])
    assert choice.best.plan.cuts or choice.best.setup.mesh.pp == 1  # explained, as plans are that users hold


def test_other_schedules_are_taken_where_they_are_faster(graph: OpGraph) -> None:
    plain, free = chosen(graph, schedule="1f1b", pp=2), chosen(graph, pp=2)
    for a, b in zip(plain.candidates, free.candidates, strict=True):
        assert b.seconds <= a.seconds
    assert any(c.setup.schedule.name != "1f1b" for c in free.candidates)


def test_what_costs_least_is_tried_first(graph: OpGraph) -> None:
    free = predicted(graph, Mesh(1, 1, 2), 1)
    zero = predicted(graph, Mesh(1, 1, 2), 1, zero_stage=1)
    both = predicted(graph, Mesh(1, 1, 2), 1, zero_stage=1, recompute="layers")
    own = free.memory[0]
    assert zero.memory[0] == replace(own, optimizer=-(-own.optimizer // 2))
    assert both.memory[0].activations < zero.memory[0].activations
    forward = zero.timeline.spans[0][0]  # the layers', which are most of it, is run again
    assert forward.stop / 2 < both.timeline.seconds - zero.timeline.seconds <= forward.stop
    for limit, setup in (
        (free.memory_bytes, (0, "none")),
        (free.memory_bytes - 1, (1, "none")),
        (zero.memory_bytes - 1, (1, "layers")),
    ):
        best = chosen(graph, limit=limit, tp=1, pp=1, microbatches=1).best.setup
        assert (best.zero_stage, best.recompute) == setup


def test_more_microbatches_where_one_is_too_large(graph: OpGraph) -> None:
    one, two = (predicted(graph, Mesh(1, 1, 2), n) for n in (1, 2))
    assert two.memory_bytes < one.memory_bytes
    best = chosen(graph, limit=two.memory_bytes, tp=1, pp=1, zero_stage=0, recompute="none").best
    assert best.setup.schedule.microbatches == 2


def test_a_backward_pass_has_the_flops_that_torch_counts() -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 192, "head_dim": 32, "intermediate_size": 512}
    model = tiny_model("llama", torch.float32, **sizes).train()
    ids = torch.randint(128, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as counted:
        loss = model(input_ids=ids, labels=ids).loss
        forward = counted.get_total_flops()
        loss.backward()
    graph = planned_graph(traced_once(model, False, ("input_ids", "labels"), {})[0], trains=True)
    # Nothing but arithmetic takes time, so that seconds are FLOPs; torch counts products alone, which are most of them.
    ideal = replace(CPU_GLOO, op_seconds=0.0, view_seconds=0.0, memory_bandwidth=1e30, flops=(("float32", 1.0),))
    request = PlanRequest(Mesh(), ideal, sizes=(("S", LENGTH), ("B", 1)))
    costs = WorkAnalysis(graph, plan(graph, request, **NAMES), request, BATCH, {}).stage(0, recompute=False).costs
    backward = costs.backward_input_seconds + costs.backward_weight_seconds
    assert costs.forward_seconds == pytest.approx(forward, rel=0.1)
    of_forward = counted.get_total_flops() / forward - 1
    assert backward / costs.forward_seconds == pytest.approx(of_forward, rel=0.05)


def test_refusals(graph: OpGraph) -> None:
    with pytest.raises(NoPlanFits, match=r"fits on no mesh of 2 devices|take .* a rank at least"):
        chosen(graph, limit=1000)
    with pytest.raises(MeshError, match="no mesh of 2 devices has the tp, pp and dp"):
        chosen(graph, tp=3)
    with pytest.raises(MeshError, match="8 sequences are not the same number for each of 3 replicas"):
        request = PlanRequest(Mesh(), CPU_GLOO)
        choose_training(graph, request, TrainingWishes(3, BATCH, dp=3), make_schedule, **NAMES)
    with pytest.raises(PlanError, match="recompute is 'all': it is one of none, layers"):
        TrainingWishes(1, 1, recompute="all")
