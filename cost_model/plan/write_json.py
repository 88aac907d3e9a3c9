"""Writes the partition plan as JSON, from which read_json.py, strictly, makes an equal plan.

    {"version": 3, "mesh": {"tp": 2, "pp": 1}, "model": "XForCausalLM", ..., "sizes": {"B": 1, "S": 128},
     "ops": [{"name": "linear", "kind": "linear", "home": 0, "inputs": ["R", "S(0)"], "outputs": ["S(2)"], ...}],
     "params": [{"name": "lm_head.weight", "shape": [32000, 768], "placement": "S(0)", "layout": 3, ...}],
     "layouts": [{"size": 9, "parts": [[[0, 5]], [[5, 9]]]}],
     "choices": [[{"role": "column"}, {"role": "row", "seconds": 2.4e-05}, {"role": "replicate", ...}]],
     "hops": [...], "stages": [...], "cuts": [...],
     "one_device_seconds": 0.39, "device_memory_bytes": 8589934592, "warnings": [],
     "request": {"pins": {"*.q_proj": "replicate"}, "cuts": ["model.layers.12"], "max_memory": [], "device_map": []}}

`request` is what to edit by hand: `autodist-fx plan --from plan.json` makes the plan anew from it.

Fields have the names of data.py, but `pins` of a request, which is `pin` there; plan.schema.json (JSON Schema 2020-12)
beside this file says what each is. To keep large plans small, some are left out where they say nothing:

    ops      stages          when the home stage alone computes it
             gather          when no output is gathered
             factor, role, module, weight                when empty
             input_layouts, output_layouts, choice       when all are -1
             compute_seconds, comm_seconds, comm_bytes   when 0
    choices  seconds, weight_bytes                       when 0
             impossible                                  when empty
    params   layout -1, stages of one: written out; there are few
    all      an empty list or text may not be left out elsewhere

A value that makes no sense raises PlanError with the path of the field: `ops[12].inputs[0]: not a placement: 'S(x)'`.
"""

from __future__ import annotations

import functools
import json
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, cast

from cost_model.errors import PlanError
from cost_model.graph.placement import Placement
from cost_model.plan.data import Alternative, OpPlan, PlanData

_SPARSE = (OpPlan, Alternative)  # whose fields are left out where they are as by default: there are thousands of them


def plan_to_dict(plan: PlanData) -> dict[str, Any]:
    """Returns the plan as dicts, lists, texts and numbers, for json.dumps. `plan_from_dict` makes an equal plan.

    Every field of data.py is written as it stands there: a new one needs no line here, but one to be read by.
    """
    data = {"version": plan.version, **_object(plan)}
    data["mesh"] = {"tp": plan.mesh.tp, "pp": plan.mesh.pp}  # of one replica
    data["sizes"] = dict(plan.sizes)
    pins = dict(plan.request.pin)
    data["request"] = {"pins": pins, **{name: value for name, value in data["request"].items() if name != "pin"}}
    return data


@functools.cache
def _defaults(kind: Any) -> tuple[tuple[str, Any], ...]:
    """Returns (name, default) of a dataclass's own fields; MISSING for a default where the field is always written."""
    own = [f for f in fields(kind) if not f.name.startswith("_")]
    return tuple((f.name, f.default if kind in _SPARSE else MISSING) for f in own)


def _object(value: Any) -> dict[str, Any]:
    usual = _usual(value) if isinstance(value, OpPlan) else {}
    data, kind = {}, cast(Any, type(value))
    for name, default in _defaults(kind):
        item = getattr(value, name)
        if item != usual.get(name, default):
            data[name] = _plain(item)
    return data


def _usual(op: OpPlan) -> dict[str, Any]:
    """Returns what the fields of an op are where they say nothing."""
    return {
        "stages": (op.home,),
        "gather": (False,) * len(op.outputs),
        "input_layouts": (-1,) * len(op.inputs),
        "output_layouts": (-1,) * len(op.outputs),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Placement):  # a tuple, too
        return str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return _object(value) if is_dataclass(value) else value


def plan_to_text(plan: PlanData) -> str:
    """Returns a plan file's text: one line for each op, parameter, layout, hop and stage, so that files compare well.

    Raises PlanError when a number in the plan is infinite or not a number, which JSON cannot say.
    """

    def compact(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)

    lines = []
    try:
        for key, value in plan_to_dict(plan).items():
            if isinstance(value, list) and value:
                body = ",\n".join("  " + compact(item) for item in value)
                lines.append(f' "{key}": [\n{body}\n ]')
            else:
                lines.append(f' "{key}": {compact(value)}')
    except ValueError as error:
        raise PlanError(f"the plan cannot be written: {error}") from error
    return "{\n" + ",\n".join(lines) + "\n}\n"
