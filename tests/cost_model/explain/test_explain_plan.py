"""explain: names find ops, figures are the plan's, and nothing that it says of a cut or an op is of another one."""

import re
from dataclasses import replace

import pytest

from cost_model.errors import PlanError
from cost_model.explain.breakdown import dearest, moved_bytes, tokens, whole_facts, whole_sections
from cost_model.explain.cut import cut_facts, cut_reason, cut_section
from cost_model.explain.find_ops import find_ops
from cost_model.explain.op import alike, op_facts, op_sections, sections_of
from cost_model.format import seconds_text
from cost_model.graph.placement import owned, shard
from cost_model.plan.data import CutOption, CutPlan
from cost_model.plan.warnings import plan_warnings
from cost_model.text_tables import sections_text
from tests.support.graphs.small import Attention, Mlp, Stack, normalized, plan_for
from tests.support.plans.examples import large_plan, small_plan


def text_of(sections):
    return sections_text([], sections)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("linear_4", 1),  # an op
        ("model.layers.2.mlp.up_proj", 1),  # a module
        ("up_proj", 4),  # the end of one
        ("mlp.up_proj", 4),
        ("model.layers.*.mlp.up_proj", 4),
        ("layers.[12].mlp.up_proj", 2),
        ("lm_head", 1),
        ("add_*", 4),
    ],
)
def test_names_that_mean_ops(name, count):
    plan = small_plan()
    found = find_ops(plan, name)
    assert len(found) == count
    if not plan.has_op(name) and not name.startswith("add"):
        assert all(op.module.endswith(name.rpartition(".")[2]) for op in found)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("up_porj", "did you mean up_proj"),
        ("linear_40", "did you mean linear_4"),
        ("model.layers.1.mlp", "'model.layers.1.mlp' runs no op itself; inside it are model.layers.1.mlp.up_proj"),
        ("*proj", "means ops of 4 modules: model.layers.*.self_attn.q_proj, "),
        ("qqqqqq", "`autodist-fx show` lists the modules"),
        ("", "no op or module"),
        ("[", "no op or module"),
    ],
)
def test_names_that_mean_none_or_several(name, message):
    with pytest.raises(PlanError) as caught:
        find_ops(small_plan(), name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# --- one op ----------------------------------------------------------------------------------------------------------


def test_an_op_with_its_alternatives():
    plan = small_plan()
    ops = find_ops(plan, "o_proj")
    (group,) = alike(plan, ops)
    assert len(group) == 4
    assert text_of(op_sections(plan, group)).strip() == EXPECTED_OP


EXPECTED_OP = """\
model.layers.0-3.self_attn.o_proj: linear, x4 (figures of each)
role         row: each tp rank sums over its part of the inputs; the parts are added up
weight       576x576, on each tp rank 576x[384|192]
stages       0-1
tensors      reads S(2), S(1); leaves P
seconds      1.23 ms
collectives  all_reduce of 576 KiB, 500 us

Roles it could have, everything else then chosen anew
role       one forward  weights a rank
---------  -----------  --------------  -----------------------------
row            34.0 ms      as planned  chosen
replicate     +3.00 ms        +324 KiB  dearer
column               -               -  not possible: no grain to cut"""


def test_layers_that_differ_are_told_apart():
    plan = small_plan()
    ops = find_ops(plan, "up_proj")
    changed = replace(plan, ops=tuple(replace(op, compute_seconds=1.0) if op is ops[1] else op for op in plan.ops))
    groups = alike(changed, find_ops(changed, "up_proj"))
    assert [len(group) for group in groups] == [3, 1]
    assert op_facts(changed, groups[1])["compute_seconds"] == 1.0


def test_what_is_faster_and_not_taken_is_explained():
    plan = small_plan()
    text = text_of(op_sections(plan, find_ops(plan, "up_proj")))
    assert re.search(r"replicate +-1.00 ms +\+324 KiB +faster, but ranks hold more: not with objective default", text)


def test_an_op_without_a_role_has_no_alternatives():
    text = text_of(op_sections(small_plan(), find_ops(small_plan(), "add_1")))
    assert "none: roles are of linears, embeddings, convolutions and layers of experts" in text
    assert "collectives  none" in text


def test_the_ops_of_a_module_without_roles_are_one_table():
    plan = small_plan()
    found = [plan.op(name) for name in ("add_1", "add_3")]
    fused = replace(found[1], compute_seconds=0.0, outputs=(shard(2),), factor="x")
    busy = replace(found[0], compute_seconds=0.001)
    (section,) = sections_of(plan, [[busy, busy], [fused]])
    header, first, second = section.rows
    assert dict(zip(header, first)) | {"reads": ""} == {
        "op": "add", "times": "x2", "stages": "0", "cut": "not", "reads": "", "leaves": "R", "compute": "1.00 ms",
        "collectives": "-",
    }  # fmt: skip
    assert dict(zip(header, second))["cut"] == "along dim 2" and dict(zip(header, second))["compute"] == "fused"
    text = text_of(sections_of(plan, [[fused]]))
    assert "cut          along dim 2 of what it leaves" in text
    assert "seconds      none of its own: fused with the ops that read it" in text


def test_an_expert_s_weight_is_on_one_rank():
    plan = small_plan()
    op = plan.op(next(op.name for op in plan.ops if op.module.endswith("layers.0.mlp.up_proj")))
    dealt = replace(op, role="expert", inputs=(owned(1), owned(1)), outputs=(owned(1),), input_layouts=(-1, -1))
    text = text_of(op_sections(plan, [dealt]))
    assert "role         expert: each tp rank has its part of the experts" in text
    assert "weight       1536x576, whole on tp rank 1 alone" in text


def test_a_fused_op_is_found_by_its_name_in_a_rank_s_graph():
    plan = small_plan()
    assert find_ops(plan, "fused_add_1") == find_ops(plan, "add_1") == [plan.op("add_1")]


def test_a_part_of_a_path_that_runs_nothing_itself_says_what_is_inside():
    with pytest.raises(PlanError, match=r"'self_attn' runs no op itself; inside it are model\.layers\.\*\.self_attn\."):
        find_ops(small_plan(), "self_attn")


# --- one cut ---------------------------------------------------------------------------------------------------------


def with_cut(options, chosen, pp=2):
    plan = small_plan(4, 2, pp)
    found = tuple(CutOption("add_1", "", before, after, nbytes) for before, after, nbytes in options)
    return replace(plan, cuts=(CutPlan(found, chosen), *plan.cuts[1:]))


@pytest.mark.parametrize(
    ("options", "chosen", "reason"),
    [
        ([(1, 3, 8), (2, 2, 8), (3, 1, 8)], 1, "takes 2.00 s, and at least 3.00 s at any place next to it"),
        ([(2, 1, 9), (2, 2, 8)], 1, "as fast as at add_1, and fewer bytes cross"),
        ([(1, 3, 8), (2, 2, 8)], 0, "the slower of the two would take 1.00 s less; but the slowest of all stages"),
        ([(1, 3, 8)], 0, "no other place"),
    ],
)
def test_why_a_cut_is_where_it_is(options, chosen, reason):
    assert reason in cut_reason(with_cut(options, chosen), 0)


def test_cuts_by_number():
    plan = small_plan(4, 1, 3)
    text = text_of([cut_section(plan, 1)])
    assert "between stages 1 and 2" in text and "add_3 (1 -> 2, 576 KiB)" in text and "add_1 (" not in text
    assert [option["chosen"] for option in cut_facts(plan, 1)["options"]] == [False, True]
    for cut in (-1, 2):
        with pytest.raises(PlanError, match=f"no cut {cut}: a plan of 3 stages has cuts 0 to 1"):
            cut_section(plan, cut)
    with pytest.raises(PlanError, match="of one stage"):
        cut_section(small_plan(4, 2, 1), 0)


def test_the_chosen_place_has_the_seconds_of_the_stages():
    """The cut of a searched plan says of its two stages what the stages say, receiving among it."""
    whole = normalized(Stack([layer for _ in range(4) for layer in (Attention(), Mlp(12, 24))]), x=("B", "S", 12))
    plan = plan_for(whole, tp=2, pp=3)
    assert all(stage.comm_seconds > 1e-4 for stage in plan.stages[1:])  # a hop is as long as some layers
    slowest = max(stage.seconds for stage in plan.stages)
    for k, cut in enumerate(plan.cuts):
        assert len(cut.options) > 1
        assert all(max(o.before_seconds, o.after_seconds) >= slowest * 0.995 for o in cut.options) or (
            slowest > max(plan.stages[k].seconds, plan.stages[k + 1].seconds)
        )
        here = cut.options[cut.chosen]
        first = next(op for op in plan.ops if op.home == k + 1)
        assert here.op == first.name
        for stage, seconds in ((k, here.before_seconds), (k + 1, here.after_seconds)):
            assert seconds == pytest.approx(plan.stages[stage].seconds, rel=5e-3)  # to three digits
        order = [plan.ops.index(plan.op(option.op)) for option in cut.options]
        assert order == sorted(set(order))
        assert cut_facts(plan, k)["sent"]


# --- the whole -------------------------------------------------------------------------------------------------------


def test_the_dearest_ops_add_up():
    plan = small_plan()
    groups = dearest(plan)
    assert sum(g.seconds for g in groups) == pytest.approx(
        sum((op.compute_seconds + op.comm_seconds) * len(op.stages) for op in plan.ops)
    )
    assert [g.seconds for g in groups] == sorted((g.seconds for g in groups), reverse=True)
    assert (groups[0].place, groups[0].role, groups[0].times) == ("model.layers.*.self_attn.o_proj", "row", 4)
    assert groups[0].seconds == pytest.approx(4 * 0.00173)


def test_seconds_of_the_ops_are_those_of_the_stages():
    whole = normalized(Stack([Mlp(), Mlp(), Mlp()]), x=("B", "S", 8))
    for tp, pp in ((1, 1), (2, 1), (2, 2)):
        plan = plan_for(whole, tp=tp, pp=pp)
        for stage in plan.stages:
            ops = [op for op in plan.ops if stage.index in op.stages]
            assert sum(op.compute_seconds for op in ops) == pytest.approx(stage.compute_seconds, rel=1e-2)
            nbytes = sum(op.comm_bytes for op in ops)
            assert nbytes == sum(b for _, _, b in stage.collectives)


def test_bytes_moved():
    plan = small_plan(4, 2, 2)  # 2 stages, each 2.25 MiB of all_reduce and 48 MiB of all_gather, and a hop
    assert moved_bytes(plan) == {"all_reduce": 2 * 2 * 2359296, "all_gather": 2 * 50331648, "send": 2 * 589824}
    assert tokens(plan) == 4 * 128
    facts = whole_facts(plan)
    assert facts["comm_share"] == pytest.approx(0.0084 / 0.034)
    assert facts["speed_up"] == pytest.approx(0.05 / 0.034)
    assert moved_bytes(small_plan(4, 1, 1)) == {"all_reduce": 0, "all_gather": 0}


def test_the_whole_is_said():
    plan = small_plan()
    text = text_of(whole_sections(plan))
    for title in ("Prediction", "Bytes moved", "The dearest ops of", "Cuts"):
        assert title in text
    assert seconds_text(plan.predicted_seconds) in text
    large = text_of(whole_sections(large_plan(500)))
    assert len(large.splitlines()) < 45 and max(map(len, large.splitlines())) <= 120


def test_unbalanced_stages_are_warned_of():
    plan = small_plan()
    assert not any("unbalanced" in warning for warning in plan_warnings(plan))
    slow = (plan.stages[0], replace(plan.stages[1], compute_seconds=0.05))
    warnings = plan_warnings(replace(plan, stages=slow, one_device_seconds=1.0))
    assert warnings == [
        "the stages are unbalanced: stage 1 takes 54.2 ms, the mean is 35.4 ms; with several batches in flight the "
        "others wait for it"
    ]
