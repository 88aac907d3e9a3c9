"""Writes the partition plan as JSON, from which read_json.py, strictly, makes an equal plan.

    {"version": 2, "mesh": {"tp": 2, "pp": 1}, "model": "XForCausalLM", ..., "sizes": {"B": 1, "S": 128},
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
             letter, role, module, weight                when empty
             input_layouts, output_layouts, choice       when all are -1
             compute_seconds, comm_seconds, comm_bytes   when 0
    choices  seconds, weight_bytes                       when 0
             impossible                                  when empty
    params   layout -1, stages of one: written out; there are few
    all      an empty list or text may not be left out elsewhere

A value that makes no sense raises PlanError with the path of the field: `ops[12].inputs[0]: not a placement: 'S(x)'`.
"""

from __future__ import annotations

import json
from typing import Any

from cost_model.errors import PlanError
from cost_model.plan.data import Alternative, OpPlan, PlanData


def plan_to_dict(plan: PlanData) -> dict[str, Any]:
    """Returns the plan as dicts, lists, texts and numbers, for json.dumps. `plan_from_dict` makes an equal plan."""
    return {
        "version": plan.version,
        "mesh": {"tp": plan.mesh.tp, "pp": plan.mesh.pp},
        "model": plan.model,
        "fingerprint": plan.fingerprint,
        "hardware": plan.hardware,
        "objective": plan.objective,
        "sizes": dict(plan.sizes),
        "ops": [_op_to_dict(op) for op in plan.ops],
        "params": [
            {
                "name": p.name, "shape": list(p.shape), "dtype": p.dtype, "placement": str(p.placement),
                "layout": p.layout, "stages": list(p.stages), "matmul": p.matmul,
            }
            for p in plan.params
        ],
        "layouts": [
            {"size": lay.size, "parts": [[list(interval) for interval in part] for part in lay.parts]}
            for lay in plan.layouts
        ],
        "choices": [[_alternative_to_dict(a) for a in choice] for choice in plan.choices],
        "hops": [
            {
                "op": h.op, "index": h.index, "source": h.source, "target": h.target, "channel": h.channel,
                "whole": h.whole, "nbytes": h.nbytes,
            }
            for h in plan.hops
        ],
        "stages": [
            {
                "index": s.index, "layers": list(s.layers), "compute_seconds": s.compute_seconds,
                "comm_seconds": s.comm_seconds, "recomputed": list(s.recomputed), "flops": s.flops,
                "weight_bytes": s.weight_bytes, "kv_cache_bytes": s.kv_cache_bytes,
                "activation_bytes": s.activation_bytes, "workspace_bytes": s.workspace_bytes,
                "collectives": [list(c) for c in s.collectives],
            }
            for s in plan.stages
        ],
        "cuts": [
            {
                "options": [
                    {
                        "op": o.op, "module": o.module, "before_seconds": o.before_seconds,
                        "after_seconds": o.after_seconds, "nbytes": o.nbytes,
                    }
                    for o in cut.options
                ],
                "chosen": cut.chosen,
            }
            for cut in plan.cuts
        ],
        "one_device_seconds": plan.one_device_seconds,
        "device_memory_bytes": plan.device_memory_bytes,
        "warnings": list(plan.warnings),
        "request": {
            "pins": dict(plan.request.pin),
            "cuts": list(plan.request.cuts),
            "max_memory": list(plan.request.max_memory),
            "device_map": [{"hardware": d.hardware, "memory": d.memory} for d in plan.request.device_map],
        },
    }  # fmt: skip


def _op_to_dict(op: OpPlan) -> dict[str, Any]:
    data: dict[str, Any] = {"name": op.name, "kind": op.kind, "home": op.home}
    if op.stages != (op.home,):
        data["stages"] = list(op.stages)
    data["inputs"] = [str(p) for p in op.inputs]
    data["outputs"] = [str(p) for p in op.outputs]
    if op.gather != (False,) * len(op.outputs):
        data["gather"] = list(op.gather)
    for key, text in (("letter", op.letter), ("role", op.role), ("module", op.module), ("weight", op.weight)):
        if text:
            data[key] = text
    if op.input_layouts != (-1,) * len(op.inputs):
        data["input_layouts"] = list(op.input_layouts)
    if op.output_layouts != (-1,) * len(op.outputs):
        data["output_layouts"] = list(op.output_layouts)
    for key in ("compute_seconds", "comm_seconds", "comm_bytes"):
        if number := getattr(op, key):
            data[key] = number
    if op.choice >= 0:
        data["choice"] = op.choice
    return data


def _alternative_to_dict(alternative: Alternative) -> dict[str, Any]:
    data: dict[str, Any] = {"role": alternative.role}
    if alternative.seconds:
        data["seconds"] = alternative.seconds
    if alternative.weight_bytes:
        data["weight_bytes"] = alternative.weight_bytes
    if alternative.impossible:
        data["impossible"] = alternative.impossible
    return data


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
