"""The published JSON Schema says what the code writes and reads, neither more nor less."""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings

from cost_model.errors import PlanError
from cost_model.graph.placement import Layout
from cost_model.mesh import Mesh
from cost_model.partition_plan import PartitionPlan
from cost_model.plan import data as plan_module
from cost_model.plan.data import PLAN_VERSION
from cost_model.plan.read_json import plan_from_dict
from cost_model.plan.write_json import plan_to_text
from tests.support.plans.examples import large_plan, small_plan
from tests.support.plans.mutations import mutated
from tests.support.plans.strategies import plans

SCHEMA = json.loads((Path(plan_module.__file__).parent / "plan.schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
OBJECTS = {
    "op": plan_module.OpPlan,
    "param": plan_module.ParamPlan,
    "hop": plan_module.Hop,
    "stage": plan_module.StageSummary,
    "cut": plan_module.CutPlan,
    "cut_option": plan_module.CutOption,
    "layout": Layout,
    "request": plan_module.Request,
    "device": plan_module.Device,
}


def test_the_schema_is_a_schema():
    VALIDATOR.check_schema(SCHEMA)
    assert SCHEMA["properties"]["version"]["const"] == PLAN_VERSION


def test_it_has_the_fields_of_the_plan():
    shown = {name: SCHEMA["$defs"][name] for name in OBJECTS}
    shown["alternative"] = SCHEMA["$defs"]["choice"]["items"]
    classes = {**OBJECTS, "alternative": plan_module.Alternative}
    shown["plan"], classes["plan"] = SCHEMA, plan_module.PlanData
    shown["mesh"], classes["mesh"] = SCHEMA["properties"]["mesh"], Mesh
    in_json = {"pin": "pins"}  # files of this version have that name; in Python it is what compile calls it
    for name, schema in shown.items():
        named = {in_json.get(f.name, f.name) for f in fields(classes[name]) if not f.name.startswith("_")}
        of_replica = {"dp"} if name == "mesh" else set()  # a plan is of one replica
        assert set(schema["properties"]) == named - of_replica, name
        assert schema["additionalProperties"] is False
    values = [value for value in vars(plan_module).values() if is_dataclass(value)]
    assert {c.__name__ for c in values} <= {c.__name__ for c in classes.values()} | {"Placement"}


@pytest.mark.parametrize("plan", [small_plan(), small_plan(3, 1, 1), large_plan(500)], ids=["2x2", "1x1", "8x4"])
def test_plans_are_valid(plan):
    VALIDATOR.validate(json.loads(plan_to_text(plan)))


@settings(max_examples=40, deadline=None)
@given(plans())
def test_random_plans_are_valid(plan):
    VALIDATOR.validate(json.loads(plan_to_text(plan)))


def test_a_field_that_may_be_left_out_may_be_left_out_in_both():
    data = json.loads(plan_to_text(small_plan()))

    def check(item, schema, path):
        for key in list(schema.get("properties", ())):
            if key in item:
                value = item.pop(key)
                if key in schema["required"]:
                    assert not VALIDATOR.is_valid(data)
                    with pytest.raises(PlanError, match=f"{key}: missing"):
                        plan_from_dict(data, PartitionPlan)
                else:
                    assert VALIDATOR.is_valid(data), (path, key)
                item[key] = value

    check(data, SCHEMA, "")
    check(data["mesh"], SCHEMA["properties"]["mesh"], "mesh")
    for name in ("op", "param", "layout", "hop", "stage", "cut"):
        check(data[f"{name}s"][0], SCHEMA["$defs"][name], name)
    check(data["cuts"][0]["options"][0], SCHEMA["$defs"]["cut_option"], "option")
    check(data["choices"][0][1], SCHEMA["$defs"]["choice"]["items"], "alternative")


def test_what_the_code_reads_the_schema_allows():
    """The code is stricter: it also compares fields with each other."""
    read = 0
    for seed in range(200):
        data = mutated(seed)
        try:
            plan_from_dict(data, PartitionPlan)
        except PlanError:
            continue
        read += 1
        VALIDATOR.validate(data)
    assert read >= 10
