"""A user's request for a split is one value, whichever way they say it; one that contradicts itself is refused by
name."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest

import autodist_fx as adx
from autodist_fx.cli.arguments import add_model_arguments, plan_options
from cost_model.costs.hardware import A100, CPU_GLOO, H100
from cost_model.errors import AutodistError, MeshError, PlanError
from cost_model.mesh import Mesh
from cost_model.plan.data import Device, Request
from cost_model.request.plan_options import PlanOptions
from cost_model.request.plan_request import PlanRequest
from tests.support.models import tiny_config
from tests.support.plans.examples import small_plan

GIB = 2**30
KEYWORDS = {
    "tp": 2,
    "pp": 2,
    "objective": "memory",
    "pin": {"*.q_proj": "replicate"},
    "cuts": ["model.layers.1"],
    "max_memory": [GIB, 2 * GIB],
    "device_map": [{"hardware": "a100", "memory": 4 * GIB}, {"hardware": "h100", "memory": 4 * GIB}],
}
RESOLVED = PlanRequest(
    Mesh(2, 2),
    replace(A100, memory_bytes=4 * GIB),
    objective="memory",
    max_memory=(GIB, 2 * GIB),
    pin=(("*.q_proj", "replicate"),),
    cuts=("model.layers.1",),
    devices=(replace(A100, memory_bytes=4 * GIB), replace(H100, memory_bytes=4 * GIB)),
)
PLAN = replace(
    small_plan(),
    hardware="a100, h100",
    objective="memory",
    request=Request(
        (("*.q_proj", "replicate"),),
        ("model.layers.1",),
        (GIB, 2 * GIB),
        (Device("a100", 4 * GIB), Device("h100", 4 * GIB)),
    ),
)


def said_on_the_command_line(*words: str) -> PlanOptions:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    return plan_options(parser.parse_args(["--model", "m", *words]))


def test_keywords_a_plan_its_file_and_the_command_line_say_the_same(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    words = "--tp 2 --pp 2 --objective memory --pin *.q_proj=replicate --cut model.layers.1 --max-memory 1GiB,2GiB "
    ways = {
        "keywords": PlanOptions.from_keywords(**KEYWORDS),  # type: ignore[arg-type]
        "a plan": PlanOptions.from_plan(PLAN),
        "a plan used as it is": PlanOptions(plan=PLAN),
        "a file": replace(PlanOptions.from_file(tmp_path / "plan.json"), sizes=()),
        "a command line": said_on_the_command_line(*words.split(), "--device-map", "a100=4GiB,h100=4GiB"),
    }
    for way, options in ways.items():
        assert options.resolve("generic") == RESOLVED, way
    assert dict(PlanOptions.from_file(tmp_path / "plan.json").sizes) == dict(PLAN.sizes)


def test_what_is_not_said_is_what_compile_documents() -> None:
    assert PlanOptions().resolve("cpu-gloo") == PlanRequest(Mesh(1, 1), CPU_GLOO)
    assert said_on_the_command_line() == PlanOptions.from_keywords() == PlanOptions()


def test_strict_is_kept_whatever_the_plan_comes_from() -> None:
    for options in (PlanOptions.from_keywords(strict=True), PlanOptions(plan=PLAN, strict=True)):
        assert options.resolve("generic").strict and not replace(options, strict=False).resolve("generic").strict
    assert said_on_the_command_line("--strict") == PlanOptions(strict=True)
    assert PlanOptions(strict=True).or_else(PlanOptions()) == PlanOptions().or_else(PlanOptions(strict=True))


def test_the_default_hardware_is_for_those_who_name_none() -> None:
    assert PlanOptions(hardware="h100").resolve("generic").hardware == H100
    assert PlanOptions(pp=2, device_map=("a100", "h100")).resolve("generic").hardware == A100
    of_plan = PlanOptions(plan=replace(PLAN, hardware="a100", request=Request()))
    assert of_plan.resolve("generic").hardware == A100
    assert replace(of_plan, hardware=H100).resolve("generic").hardware == H100


def test_one_set_of_options_before_another() -> None:
    file = PlanOptions(tp=2, objective="memory", sizes=(("B", 3), ("S", 5)), cuts=(1,), device_map=("a100", "h100"))
    assert PlanOptions().or_else(file) == file and file.or_else(PlanOptions()) == file
    mine = PlanOptions(pp=3, sizes=(("B", 7),), cuts=(2,), hardware="h100", plan=PLAN)
    assert mine.or_else(file) == PlanOptions(
        tp=2, pp=3, hardware="h100", objective="memory", sizes=(("B", 7), ("S", 5)), cuts=(2,), plan=PLAN
    ), "hardware that is named takes the place of the other's device map"


@pytest.mark.parametrize("name", ["pin", "cuts", "max_memory", "device_map"])
def test_a_plan_is_not_changed_by_options_beside_it(name: str) -> None:
    with pytest.raises(PlanError, match=f"a plan is used as it is, and {name} would change it"):
        PlanOptions.from_keywords(plan=PLAN, **{name: KEYWORDS[name]}).resolve("generic")  # type: ignore[arg-type]


def test_the_mesh_of_a_plan() -> None:
    assert PlanOptions(plan=PLAN).mesh == PlanOptions(tp=2, plan=PLAN).mesh == Mesh(2, 2)
    with pytest.raises(AutodistError, match=r"the plan is for tp=2 x pp=2, and tp=2 x pp=1 was asked for: leave tp"):
        _ = PlanOptions(pp=1, plan=PLAN).mesh
    with pytest.raises(MeshError, match="mesh axis tp must be a whole number of ranks"):
        PlanOptions(tp=0).resolve("generic")


def test_compile_refuses_another_mesh_than_the_plan_is_for() -> None:
    with pytest.raises(AutodistError, match="the plan is for tp=2 x pp=2, and tp=3 x pp=2 was asked for"):
        adx.compile(tiny_config("llama"), tp=3, plan=PLAN)
    with pytest.raises(PlanError, match="the plan is for another graph"):  # tp and pp left out: no mesh was asked for
        adx.compile(tiny_config("llama"), plan=PLAN)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"version": 1}, "is no plan of version 3"),
        ({"mesh": 3}, "mesh is 3: expected an object"),
        ({"objective": ["shard"]}, r"objective is \['shard'\]: expected a name"),
        ({"hardware": {}}, "hardware is {}: expected a name"),
        ({"request": {"pin": {}}}, "request.pin: unknown field; known are pins, cuts, max_memory, device_map"),
        ({"request": {"pins": {"q": 1}}}, "request.pins is .*: expected roles by pattern"),
        ({"request": {"cuts": "q"}}, "request.cuts is 'q': expected a list of modules or layer numbers"),
    ],
)
def test_a_file_that_is_none_says_where(changed: dict[str, object], said: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"version": 3} | changed))
    with pytest.raises(PlanError, match=said):
        PlanOptions.from_file(tmp_path / "plan.json")
