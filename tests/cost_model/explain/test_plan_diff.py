"""diff: nothing of equal plans, something of every other; before and after are the plans' own figures."""

import json
from dataclasses import replace

import pytest

from cost_model.costs.hardware import A100, CPU_GLOO
from cost_model.errors import PlanError
from cost_model.explain.diff import Changed, RoleChange
from tests.support.graphs.small import Attention, Mlp, Stack, normalized, plan_for
from tests.support.plans.examples import small_plan


def test_equal_plans_do_not_differ():
    diff = small_plan().diff(small_plan())
    assert not diff and str(diff) == ""


def test_another_model_is_refused_by_name():
    with pytest.raises(PlanError, match="different models, LlamaForCausalLM and OPTForCausalLM"):
        small_plan().diff(replace(small_plan(), model="OPTForCausalLM"))


def test_a_role_that_changed():
    plan = small_plan()
    ops = tuple(
        replace(op, role="row") if op.module.endswith("up_proj") and op.home == 1 else op for op in plan.ops
    )
    diff = plan.diff(replace(plan, ops=ops))
    modules = ("model.layers.2.mlp.up_proj", "model.layers.3.mlp.up_proj")
    assert diff.roles == (RoleChange("model.layers.*.mlp.up_proj", modules, "column", "row"),)
    assert not (diff.settings or diff.cuts or diff.placements or diff.stages_moved or diff.nbytes or diff.seconds)
    assert "model.layers.*.mlp.up_proj     x2  column  row" in str(diff)


def test_a_cut_that_moved():
    plan = small_plan()
    ops = tuple(
        replace(op, home=0, stages=(0,)) if op.module.startswith("model.layers.2") else op for op in plan.ops
    )
    diff = plan.diff(replace(plan, ops=ops))
    before = next(op.name for op in plan.ops if op.module == "model.layers.2.self_attn.q_proj")
    after = next(op.name for op in plan.ops if op.module == "model.layers.3.self_attn.q_proj")
    (cut,) = diff.cuts
    assert (cut.name, before in cut.before, after in cut.after) == ("stage 0 | 1", True, True)
    assert diff.stages_moved == 5 and not diff.roles


def test_meshes_of_another_shape():
    """tp=8 x pp=2 against pp=4."""
    before, after = small_plan(8, 8, 2), small_plan(8, 1, 4)
    diff = before.diff(after)
    assert diff.settings[0] == Changed("mesh", "tp=8 x pp=2", "tp=1 x pp=4")
    assert [cut.name for cut in diff.cuts] == ["stage 0 | 1", "stage 1 | 2", "stage 2 | 3"]
    assert [cut.before for cut in diff.cuts[1:]] == [None, None]
    assert Changed("send", 1, 3) in diff.counts
    assert {c.name: c.after for c in diff.seconds}["one forward"] == after.predicted_seconds
    back = after.diff(before)
    assert [(c.before, c.after) for c in back.seconds] == [(c.after, c.before) for c in diff.seconds]
    assert max(map(len, str(diff).splitlines())) <= 120
    json.dumps(diff.to_dict())


CHANGES = {
    "objective": "latency",
    "hardware": "h100",
    "sizes": (("B", 7),),
    "fingerprint": "f" * 64,
    "device_memory_bytes": 1,
    "one_device_seconds": 0.9,
    "warnings": ("beware",),
    "choices": (),
    "cuts": (),
    "hops": (),
}


@pytest.mark.parametrize("field", CHANGES)
def test_no_difference_is_silent(field):
    plan = small_plan()
    if field == "choices":
        changed = replace(plan, choices=(), ops=tuple(replace(op, choice=-1) for op in plan.ops))
    else:
        changed = replace(plan, **{field: CHANGES[field]})
    diff = plan.diff(changed)
    assert diff and len(str(diff).splitlines()) >= 3


def test_plans_of_the_searches():
    layers = [layer for _ in range(4) for layer in (Attention(12, 4, 2, 3), Mlp(12, 24))]
    whole = normalized(Stack(layers), x=("B", "S", 12))
    cpu, gpu = (plan_for(whole, tp=2, pp=2, hardware=h) for h in (CPU_GLOO, A100))
    diff = cpu.diff(gpu)
    assert Changed("hardware", "cpu-gloo", "a100") in diff.settings
    roles = {op.name: (op.role, gpu.op(op.name).role) for op in cpu.ops}
    assert sum(len(change.modules) for change in diff.roles) == sum(a != b for a, b in roles.values())
    assert {c.name: (c.before, c.after) for c in diff.seconds}["one forward"] == (
        cpu.predicted_seconds, gpu.predicted_seconds,
    )  # fmt: skip
    many = plan_for(whole, tp=1, pp=4)
    assert {change.after for change in cpu.diff(many).roles} == {"replicate"}
