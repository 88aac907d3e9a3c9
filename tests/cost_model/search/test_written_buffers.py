"""Buffers that a graph writes: the ops that read and write one are on one stage, whatever that costs."""

from __future__ import annotations

import pytest

import autodist_fx as adx
from cost_model.errors import MeshError, PlanError
from cost_model.graph.op_graph import Op, OpGraph, TensorRef, TensorSpec
from cost_model.partition_plan import PartitionPlan
from cost_model.search.check_plan import check_plan
from cost_model.search.pipeline import OpCost, PipelineSearch
from tests.support.models import tiny_config

ROW = (TensorSpec((4,), "float32"),)


def search() -> PipelineSearch:
    """Four layers; layer 1 reads `kept`, layer 2 writes what it makes of that; layer 3 reads what was written."""
    ops = [Op("x", "input", (), ROW), Op("kept", "buffer", (), ROW)]
    ops += [Op(f"w{k}", "param", (), ROW) for k in range(4)]
    reads = {0: ["x"], 1: ["op0", "kept"], 2: ["op1"], 3: ["write"]}
    for k in range(4):
        ops.append(Op(f"op{k}", "linear", tuple(TensorRef(name) for name in (*reads[k], f"w{k}")), ROW))
        if k == 2:
            ops.append(Op("write", "opaque.write_buffers", (TensorRef("op2"), TensorRef("kept")), ROW, mutates=True))
    graph = OpGraph(ops, [TensorRef("op3")])
    costs = {op.name: OpCost(1.0, 0, False) for op in graph}
    return PipelineSearch(graph, costs, {TensorRef(op.name): 1.0 for op in graph}, {f"w{k}": 1 for k in range(4)})


def test_the_ops_that_read_and_write_a_buffer() -> None:
    assert search().graph.state == {"kept": ("op1", "write")}


def test_no_cut_divides_them() -> None:
    found = search()
    assert found.sequence == ["op0", "op1", "op2", "write", "op3"]
    assert [stage.start for stage in found.solve(3)] == [0, 1, 4]
    with pytest.raises(MeshError, match="the model has only 2 places to cut it"):
        search().solve(4)


def test_a_cut_that_does_is_refused() -> None:
    with pytest.raises(MeshError, match="divides the ops that read and write kept"):
        search().solve(2, cuts=[2])


def test_they_are_not_computed_again_and_a_plan_that_says_so_is_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0}
    compiled = adx.compile(tiny_config("llama", rope_scaling=rope), tp=1, pp=2, hardware="cpu-gloo")
    state = compiled.op_graph.state
    assert len(state) == 2 and all(len(users) > 1 for users in state.values())
    for users in state.values():
        assert {compiled.plan.op(name).stages for name in users} == {(0,)}
    data = compiled.plan.to_dict()
    again = next(name for users in state.values() for name in users if not compiled.op_graph[name].mutates)
    next(op for op in data["ops"] if op["name"] == again)["stages"] = [0, 1]
    with pytest.raises(PlanError, match=r"stages \[0, 1\] all read or write model.rotary_emb.kept_\w+, which"):
        check_plan(PartitionPlan.from_dict(data), compiled.op_graph)
