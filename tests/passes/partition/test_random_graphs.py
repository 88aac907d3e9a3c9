"""Random modules, split by random plans: together the ranks compute what the whole does, and `verify` says so.

    ADX_RANDOM_GRAPHS=1000 pytest -n 4 tests/passes/test_random_graphs.py      # CI runs fewer
"""

from __future__ import annotations

import os
import random

import pytest
import torch

from autodist_fx.simulation.backward import glued, run_backward
from cost_model.errors import MeshError
from passes.op_graph.build import build_op_graph
from passes.partition.pipeline import emit_rank
from passes.verify.verify import verify
from tests.support.graphs.random_models import RandomModule, random_costs
from tests.support.graphs.small import FREE, fill, normalized, plan_for, run_split

GRAPHS = int(os.environ.get("ADX_RANDOM_GRAPHS", "40"))
PART = 20  # graphs in one test


@pytest.mark.drawn(1)
@pytest.mark.parametrize("first", range(0, GRAPHS, PART))
@torch.no_grad()
def test_random_graphs_by_random_plans(first: int) -> None:
    sharded = 0
    for seed in range(first, first + PART):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        module = RandomModule(seed, steps=rng.choice([8, 12, 20])).double().eval()
        x = torch.randn(2, 5, module.width, dtype=torch.float64)
        expected = module(x)
        whole = normalized(module, x=("B", "S", module.width))
        graph = build_op_graph(whole)
        for best in (True, False, False):
            tp, pp, costs = rng.randint(2, 4), rng.choice([1, 1, 2]), rng.randrange(10**6)
            said = f"seed {seed}, tp={tp}, pp={pp}, {'the best plan' if best else f'costs {costs}'}\n{module.text()}"
            try:
                if best:
                    plan = plan_for(whole, tp, pp, FREE)
                else:
                    with random_costs(costs):
                        plan = plan_for(whole, tp, pp, FREE, objective=rng.choice(["shard", "latency"]))
            except MeshError:
                continue  # too few places to cut
            try:
                verify([emit_rank(whole, plan, rank) for rank in range(tp * pp)], plan, graph, whole)
                found = run_split(whole, plan, {"x": x})
            except Exception as error:
                raise AssertionError(said) from error
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                error = float((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-3))
                assert error <= 1e-9, f"{name}: {error}, {said}"
            sharded += sum(not p.is_replicate for op in plan.ops for p in op.outputs)
    assert sharded > 10 * PART, "or nothing is shown"


class _WithLoss(RandomModule):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": sum(torch.sin(y).sum() for y in super().forward(x).values())}


@pytest.mark.drawn(1)
@pytest.mark.parametrize("first", range(0, GRAPHS // 2, PART))
def test_gradients_of_random_graphs_by_random_plans(first: int) -> None:
    """Each as autograd has it for the whole module, on each rank that holds a piece of it."""
    owed = 0
    for seed in range(first, first + PART):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        module = _WithLoss(seed, steps=rng.choice([8, 12, 20])).double().eval()
        x = torch.randn(2, 5, module.width, dtype=torch.float64)
        loss = module(x)["loss"]
        if not loss.requires_grad:
            continue  # returns lengths, or signs
        loss.backward()
        wanted = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        largest = max(float(w.abs().max()) for w in wanted.values())
        whole = normalized(module, x=("B", "S", module.width))
        for _ in range(2):
            tp, pp, costs = rng.randint(2, 4), rng.choice([1, 1, 2]), rng.randrange(10**6)
            said = f"seed {seed}, tp={tp}, pp={pp}, costs {costs}\n{module.text()}"
            try:
                with random_costs(costs):
                    plan = plan_for(whole, tp, pp, FREE, objective=rng.choice(["shard", "latency"]))
            except MeshError:
                continue
            try:
                programs = [emit_rank(whole, plan, rank, train=True) for rank in range(tp * pp)]
                verify(programs, plan, build_op_graph(whole), whole)
                for program in programs:
                    fill(program.graph_module, program.param_shards, module)
                    program.graph_module.requires_grad_()
                found = glued(programs, run_backward(programs, {"x": x})[1])
            except Exception as error:
                raise AssertionError(said) from error
            owed += sum(len(p.grad_sums or ()) for p in programs)
            for name, value in wanted.items():
                error = float((found.get(name, torch.zeros_like(value)) - value).abs().max())
                assert error <= 1e-9 * max(float(value.abs().max()), 1e-6 * largest), f"{name}: {error}, {said}"
    assert owed > PART, "or nothing is shown"
