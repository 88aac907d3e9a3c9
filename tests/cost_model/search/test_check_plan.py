"""A plan that was edited by hand is used if it still makes sense, and else refused by what contradicts what."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import autodist_fx as adx
from cost_model.errors import PlanError
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.data import HOP_CHANNELS
from tests.support.models import tiny_config

CONFIG = tiny_config("llama", num_hidden_layers=3)
PLAN = adx.compile(CONFIG, tp=2, pp=2, hardware="cpu-gloo", use_cache=True).plan
Edit = Callable[[dict[str, Any]], None]


def edited(edit: Edit) -> PartitionPlan:
    data = PLAN.to_dict()
    edit(data)
    return PartitionPlan.from_dict(data)


def of(data: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
    return next(x for x in data[kind] if x["name"].endswith(name))


def op(name: str, **changes: Any) -> Edit:
    return lambda data: of(data, "ops", name).update(changes)


def param(name: str, **changes: Any) -> Edit:
    return lambda data: of(data, "params", name).update(changes)


def layouts_swapped(data: dict[str, Any]) -> None:
    """Ranks 0 and 1 change places in one layout, for one op."""
    linear = of(data, "ops", "layers_0_self_attn_q_proj")
    mine = data["layouts"][linear["output_layouts"][0]]
    data["layouts"].append({"size": mine["size"], "parts": mine["parts"][::-1]})
    linear["output_layouts"] = [len(data["layouts"]) - 1]


def moved(data: dict[str, Any]) -> None:
    """Everything of layer 1, in which the cut is, to the second stage, hops left as they are."""
    for found in data["ops"]:
        if ".layers.1" in found.get("module", ""):
            found["home"] = 1
            found.pop("stages", None)


def another_hop(data: dict[str, Any]) -> None:
    data["hops"].append({**data["hops"][0], "op": "cos", "channel": 9})


def swapped(data: dict[str, Any]) -> None:
    data["ops"][-1], data["ops"][-2] = data["ops"][-2], data["ops"][-1]


def without_op(data: dict[str, Any]) -> None:
    data["cuts"] = []
    data["ops"] = [x for x in data["ops"] if not x["name"].endswith("layers_2_mlp_down_proj")]


ROW = {"factor": "row", "inputs": ["R", "R"], "outputs": ["P"], "gather": [True], "input_layouts": [-1, -1],
       "output_layouts": [-1]}  # fmt: skip
BROKEN: dict[str, tuple[Edit, str]] = {
    "role alone": (op("layers_0_mlp_up_proj", role="row", choice=-1), "and its placements are those of 'column'"),
    "no strategy": (op("layers_0_mlp_up_proj", **ROW), "cannot run as row [R, R -> P gathered]; it can as"),
    "not gathered": (op("layers_0_mlp_down_proj", gather=[False]), "lies as a sum still owed"),
    "layout": (layouts_swapped, "is not the one that its ties to other tensors give"),
    "weight": (param("layers.0.self_attn.q_proj.weight", placement="S(1)"), "lies cut along dim 1 and is not gathered"),
    "shape": (param("norm.weight", shape=[49]), "is float32[48], not as the plan says"),
    "stages of a weight": (param("0.mlp.up_proj.weight", stages=[0, 1]), "is on stages [0, 1], and is read on [0]"),
    "layer moved": (moved, "where it is neither computed nor received"),
    "moved back": (op("layers_0_mlp_up_proj", home=1), "after ops of stage"),
    "order": (swapped, "do not stand in execution order"),
    "missing op": (without_op, "down_proj is missing"),
    "no hop": (lambda data: data["hops"].clear(), "where it is neither computed nor received"),
    "hop of what is computed again": (another_hop, "sent from stage 0 to 1: stage 0 has it, and stages [0, 1] compute"),
    "channel": (lambda data: data["hops"].append(dict(data["hops"][0])), "is there twice"),
    "cache twice": (op("update", stages=[0, 1]), "has side effects, and stages [0, 1] all run it"),
}


def test_a_plan_as_it_is_passes() -> None:
    assert adx.compile(CONFIG, plan=edited(lambda data: None), use_cache=True).plan == PLAN


@pytest.mark.drawn(8)
@pytest.mark.parametrize("name", BROKEN)
def test_a_contradiction_is_named(name: str) -> None:
    edit, said = BROKEN[name]
    with pytest.raises(PlanError, match=re.escape(said)) as raised:
        adx.compile(CONFIG, plan=edited(edit), use_cache=True, verify=False)
    assert "\n" not in str(raised.value)


def test_a_hop_on_a_channel_of_the_runtimes_is_refused() -> None:
    hops = (replace(PLAN.hops[0], channel=HOP_CHANNELS), *PLAN.hops[1:])
    with pytest.raises(PlanError, match=f"channel {HOP_CHANNELS} is reserved for the runtime"):
        adx.compile(CONFIG, plan=replace(PLAN, hops=hops), use_cache=True, verify=False)


def test_what_a_plan_was_asked_for_is_not_asked_for_twice() -> None:
    with pytest.raises(PlanError, match="a plan is used as it is, and pin would change it"):
        adx.compile(CONFIG, plan=PLAN, use_cache=True, pin={"q_proj": "row"})
