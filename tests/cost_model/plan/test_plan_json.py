"""Plans read back equal, and whatever is not a plan is refused by the field's name, never by a traceback."""

import json
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings

from cost_model.errors import PlanError
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.read_json import plan_from_dict, plan_from_text
from cost_model.plan.write_json import plan_to_dict, plan_to_text
from tests.support.plans.examples import large_plan, small_plan
from tests.support.plans.strategies import plans

# --- both ways -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (1, 3), (2, 2), (3, 2), (8, 4)])
def test_reads_back_equal(mesh):
    plan = small_plan(12, *mesh)
    assert plan_from_dict(plan_to_dict(plan), PartitionPlan) == plan
    assert plan_from_text(plan_to_text(plan), PartitionPlan) == plan
    assert plan_to_text(plan_from_text(plan_to_text(plan), PartitionPlan)) == plan_to_text(plan)


def test_save_and_load(tmp_path):
    plan = small_plan()
    plan.save(tmp_path / "plan.json")
    assert PartitionPlan.load(tmp_path / "plan.json") == plan
    # and through any other JSON writer
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict(), indent=4))
    assert PartitionPlan.load(tmp_path / "plan.json") == plan


def test_one_line_for_each_op(tmp_path):
    lines = plan_to_text(small_plan()).splitlines()
    assert sum('"kind":"linear"' in line for line in lines) == 17
    assert all(len(line) < 400 for line in lines)


def test_the_plan_of_a_70b_model_is_small_and_quick():
    plan = large_plan(8000)
    start = time.process_time()
    text = plan_to_text(plan)
    written = time.process_time()
    assert plan_from_text(text, PartitionPlan) == plan
    assert len(text) < 3 * 2**20
    assert written - start < 1
    assert time.process_time() - written < 2  # 0.3 s measured


def test_numbers_that_json_cannot_say_are_not_written():
    with pytest.raises(PlanError, match="cannot be written"):
        plan_to_text(replace(small_plan(), one_device_seconds=float("inf")))


@settings(max_examples=150, deadline=None)
@given(plans())
def test_random_plans_read_back_equal_and_print(plan):
    assert plan_from_dict(plan_to_dict(plan), PartitionPlan) == plan
    text = plan_to_text(plan)
    assert plan_from_text(text, PartitionPlan) == plan
    assert all(len(line) <= 120 for line in str(plan).splitlines())


# --- mistakes --------------------------------------------------------------------------------------------------------


def _set(*path, to):
    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return change


def _del(*path):
    def change(data):
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


MISTAKES = {
    "ops[4].inputs[0]: not a placement: 'S(x)'": _set("ops", 4, "inputs", 0, to="S(x)"),
    "ops[4].inputs[1]: not a placement: 'S(00)'": _set("ops", 4, "inputs", 1, to="S(00)"),
    "ops[4].inputs[1]: not a placement: 3": _set("ops", 4, "inputs", 1, to=3),
    "ops[4].outputs: expected a list, got a text": _set("ops", 4, "outputs", to="R"),
    "ops[4].colour: unknown field; known are choice, comm_bytes,": _set("ops", 4, "colour", to="red"),
    "ops[4].kind: missing": _del("ops", 4, "kind"),
    "ops[4].kind: expected a text, got null": _set("ops", 4, "kind", to=None),
    "ops[4].home: 2 is out of range (0 to 1)": _set("ops", 4, "home", to=2),
    "ops[4].home: expected a whole number, got True": _set("ops", 4, "home", to=True),
    "ops[4].home: expected a whole number, got 0.0": _set("ops", 4, "home", to=0.0),
    "ops[0].stages: the home stage 0 is not among them": _set("ops", 0, "stages", to=[1]),
    "ops[0].stages: expected one or more stages in ascending order, got [1, 0]": _set("ops", 0, "stages", to=[1, 0]),
    "ops[0].stages: expected one or more stages in ascending order, got []": _set("ops", 0, "stages", to=[]),
    "ops[2].gather: 2 flags for 1 outputs": _set("ops", 2, "gather", to=[True, False]),
    "ops[2].gather[0]: expected true or false, got 1": _set("ops", 2, "gather", 0, to=1),
    "ops[0].gather[0]: the output is R, whole on every rank as it is": _set("ops", 0, "gather", to=[True]),
    "ops[4].input_layouts[1]: 4 is out of range (-1 to 3)": _set("ops", 4, "input_layouts", 1, to=4),
    "ops[4].input_layouts[1]: a tensor in S(0) needs a layout": _set("ops", 4, "input_layouts", 1, to=-1),
    "ops[4].input_layouts[0]: a tensor in R has no layout": _set("ops", 4, "input_layouts", 0, to=1),
    "ops[4].input_layouts: 1 layouts for 2 tensors": _set("ops", 4, "input_layouts", to=[-1]),
    "ops[4].input_layouts: missing, and a tensor is sharded": _del("ops", 4, "input_layouts"),
    "ops[5].name: 'linear_4' is listed twice": _set("ops", 5, "name", to="linear_4"),
    "ops[5]: expected an object, got a list": _set("ops", 5, to=[]),
    "ops[5].module: has characters that cannot be printed": _set("ops", 5, "module", to="a\x1b[2J"),
    "ops[4].choice: 2 is out of range (-1 to 1)": _set("ops", 4, "choice", to=2),
    "ops[4].choice: choices[0] has no role 'vocab' that is possible": _set("ops", 4, "role", to="vocab"),
    "ops[4].compute_seconds: expected a finite number, 0 or more, got -1.5": _set("ops", 4, "compute_seconds", to=-1.5),
    "choices[0]: expected a list, got an object": _set("choices", 0, to={}),
    "choices[0][1]: expected an object, got a text": _set("choices", 0, 1, to="row"),
    "choices[0][1].role: 'column' is listed twice": _set("choices", 0, 1, "role", to="column"),
    "choices[0][1].seconds: expected a finite number, got nan": _set("choices", 0, 1, "seconds", to=float("nan")),
    "choices[0][1].impossible: what is not possible has no costs": _set("choices", 0, 1, "impossible", to="no"),
    "choices[0][1].cost: unknown field": _set("choices", 0, 1, "cost", to=1),
    "cuts: 2 for 2 stages; expected 1, or none": lambda data: data["cuts"].append(data["cuts"][0]),
    "cuts[0].chosen: 2 is out of range (0 to 1)": _set("cuts", 0, "chosen", to=2),
    "cuts[0].options[1].op: no op named 'gone'": _set("cuts", 0, "options", 1, "op", to="gone"),
    "cuts[0].options[1].before_seconds: missing": _del("cuts", 0, "options", 1, "before_seconds"),
    "stages[0].workspace_bytes: missing": _del("stages", 0, "workspace_bytes"),
    "params[1].placement: a parameter is R, S(<dim>), D(<dim>) or O(<rank>), never P": (
        _set("params", 1, "placement", to="P")
    ),
    "params[1].placement: O(7) names no tp rank": _set("params", 1, "placement", to="O(7)"),
    "params[1].placement: S(2) of a tensor with 2 dims": _set("params", 1, "placement", to="S(2)"),
    "params[1].layout: layout 1 is of 1536 elements, the dim has 576": _set("params", 1, "layout", to=1),
    "params[1].shape[0]: -1 is out of range (0 or more)": _set("params", 1, "shape", 0, to=-1),
    "params[1].stages[0]: 7 is out of range (0 to 1)": _set("params", 1, "stages", to=[7]),
    "params[1].matmul: expected true or false, got 'yes'": _set("params", 1, "matmul", to="yes"),
    "params[1].name: 'model.embed_tokens.weight' is listed twice": _set(
        "params", 1, "name", to="model.embed_tokens.weight"
    ),
    "layouts[0].parts: 1 parts for 2 tp ranks": _set("layouts", 0, "parts", to=[[[0, 576]]]),
    "layouts[0].parts[0][0][1]: 577 is out of range (0 to 576)": _set("layouts", 0, "parts", 0, 0, 1, to=577),
    "layouts[0].parts[0][0]: not an interval [start, stop] with start < stop: [9, 3]": _set(
        "layouts", 0, "parts", 0, 0, to=[9, 3]
    ),
    "layouts[3].parts[0][1]: starts before the interval in front of it stops": _set(
        "layouts", 3, "parts", 0, to=[[8, 12], [0, 4], [16, 20]]
    ),
    "layouts[0].parts: no rank holds element 300 of 576": _set("layouts", 0, "parts", 0, 0, to=[0, 300]),
    "hops[0].op: no op named 'gone'": _set("hops", 0, "op", to="gone"),
    "hops[0].index: 1 is out of range (0 to 0)": _set("hops", 0, "index", to=1),
    "hops[0].target: a hop goes to a later stage, not from 0 to 0": _set("hops", 0, "target", to=0),
    "hops[0].target: 2 is out of range (0 to 1)": _set("hops", 0, "target", to=2),
    "hops[0].channel: 16777216 is reserved for the runtime; a hop's is below 16777216": _set(
        "hops", 0, "channel", to=1 << 24
    ),
    "hops[0].channel: 2130706434 is reserved": _set("hops", 0, "channel", to=0x7F000002),
    "hops[0].channel: -1 is out of range": _set("hops", 0, "channel", to=-1),
    "stages: a mesh of tp=2 x pp=2 needs stages 0 to 1": _del("stages", 1),
    "stages[1].recomputed[0]: no op named 'gone'": _set("stages", 1, "recomputed", to=["gone"]),
    "stages[1].flops: expected a finite number, 0 or more, got nan": _set("stages", 1, "flops", to=float("nan")),
    "stages[1].compute_seconds: expected a finite number, 0 or more, got -1": _set(
        "stages", 1, "compute_seconds", to=-1
    ),
    "stages[1].collectives[0]: not [name, count, bytes]": _set("stages", 1, "collectives", 0, to=["all_reduce", 1]),
    "mesh.tp: 0 is out of range (1 or more)": _set("mesh", "tp", to=0),
    "mesh.dp: unknown field; known are pp, tp": _set("mesh", "dp", to=2),
    "mesh: expected an object, got a list": _set("mesh", to=[2, 2]),
    "sizes.B: expected a whole number, got 'many'": _set("sizes", "B", to="many"),
    "version: this autodist_fx reads plans of version 3, not 7": _set("version", to=7),
    "version: this autodist_fx reads plans of version 3, not 1; make the plan again": _set("version", to=1),
    "version: missing": _del("version"),
    "device_memory_bytes: a number": _set("device_memory_bytes", to=10**5000),
    "one_device_seconds: expected a number, got '1 s'": _set("one_device_seconds", to="1 s"),
    "colour: unknown field": _set("colour", to="red"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_an_error_that_names_the_field(message):
    data = json.loads(plan_to_text(small_plan()))
    MISTAKES[message](data)
    with pytest.raises(PlanError) as caught:
        plan_from_dict(data, PartitionPlan)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "a plan is a JSON object, not a list"),
        ("null", "a plan is a JSON object, not null"),
        ("17", "a plan is a JSON object, not a number"),
        ("[" * 100000, "nested too deeply"),
        ('{"version": ' + "9" * 5000 + "}", "not JSON"),
        ('{"version": 1, "version": 1}', "field 'version' is given twice"),
    ],
)
def test_what_is_no_plan_at_all(text, message, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=r"plan\.json: ") as caught:
        PartitionPlan.load(path)
    assert message in str(caught.value)


def test_files_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(PlanError, match="cannot read the plan file"):
        PartitionPlan.load(tmp_path / "none.json")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(PlanError, match="cannot read the plan file"):
        PartitionPlan.load(tmp_path / "image.png")
    with pytest.raises(PlanError, match="cannot write the plan file"):
        small_plan().save(tmp_path / "no" / "such" / "folder.json")
