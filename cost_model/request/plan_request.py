"""What a plan is made for: a mesh, its devices, an objective, and what the user has fixed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cost_model.costs.hardware import PRESETS, Hardware
from cost_model.errors import AutodistError, PlanError, reason_text
from cost_model.mesh import Mesh
from cost_model.plan.data import PLAN_VERSION, PlanData
from cost_model.request.cuts import Cut
from cost_model.request.devices import DeviceMap, Memory, devices_of_stages, memory_of_stages
from cost_model.request.pins import Pin

# Seconds per byte of matmul weight held beyond an even share, while the search chooses. "shard": a microsecond a byte,
# so that a 16 KB matrix weighs more than dozens of collectives: who asks for tp=N asks for sharded weights. "latency"
# and "throughput": time decides alone, of one forward and of the slowest stage; on one mesh of equal devices they give
# one plan, since where stages end changes their sum by hops at most, and they differ in what choose_mesh ranks by.
# "memory": as "shard", and stages end where the fullest device is as empty as can be, not where the slowest is as fast.
PRICES = {"shard": 1e-6, "latency": 0.0, "throughput": 0.0, "memory": 1e-6}
OBJECTIVES = tuple(PRICES)
LEAST = {"B": 1, "S": 1, "P": 0, "E": 1}  # of each length that may be asked for


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a plan is made for.

    `sizes` maps "B" (batch), "S" (tokens per step), "P" (tokens cached before) and "E" (what an encoder reads) to
    lengths, where they are not to be the planner's own.
    `devices[k]` is what stage k runs on, where not all are `hardware`; the ranks of one stage are alike.
    `memory_bytes[k]` is what a device of stage k may hold of weights and caches (None: no limit).
    `pins`: (pattern, role) of ops (pins.py); `cuts`: where stages begin (cuts.py), () where the search decides.
    `like`: a plan for another graph of the model, whose weights and caches are to lie as in that one (like_plan.py).
    `in_flight`: micro-batches whose caches a stage holds at once; as many as stages keep a pipeline full.
    """

    mesh: Mesh
    hardware: Hardware
    objective: str = "shard"
    sizes: tuple[tuple[str, int], ...] = ()
    memory_bytes: tuple[int, ...] | None = None
    pins: tuple[Pin, ...] = ()
    cuts: tuple[Cut, ...] = ()
    devices: tuple[Hardware, ...] = ()
    in_flight: int = 1
    like: PlanData | None = None

    def __post_init__(self) -> None:
        if self.objective not in PRICES:
            raise PlanError(f"no objective {self.objective!r}: choose one of {', '.join(PRICES)}")
        for name, given in (("devices", self.devices or None), ("memory_bytes", self.memory_bytes)):
            if given is not None and len(given) != self.mesh.pp:
                raise PlanError(f"{len(given)} {name} for pp={self.mesh.pp}: give one for each stage")

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `request_for` that make this request again, on a mesh of as many stages."""
        return {
            "hardware": self.hardware,
            "objective": self.objective,
            "pin": dict(self.pins),
            "cuts": self.cuts,
            "max_memory": self.memory_bytes,
            "device_map": self.devices or None,
        }

    @property
    def stage_devices(self) -> tuple[Hardware, ...]:
        return self.devices or (self.hardware,) * self.mesh.pp


def request_for(
    mesh: Mesh,
    hardware: Hardware | None,
    *,
    objective: str = "shard",
    sizes: Mapping[str, int] | None = None,
    pin: Mapping[str, str] | None = None,
    cuts: Sequence[Cut] | None = None,
    max_memory: Memory | None = None,
    device_map: DeviceMap | None = None,
) -> PlanRequest:
    """A request from what users write (see `autodist_fx.compile`). With a device map each stage keeps within the memory
    of its devices, or within `max_memory` where that is less. Raises PlanError naming the argument."""
    for symbol, n in (sizes or {}).items():
        if symbol not in LEAST:
            raise PlanError(f"sizes has no length {symbol!r}: choose among {', '.join(LEAST)}")
        if isinstance(n, bool) or not isinstance(n, int) or n < LEAST[symbol]:
            raise PlanError(f"sizes: {symbol} is {n!r}: give a whole number, {LEAST[symbol]} or more")
    devices = devices_of_stages(device_map, mesh)
    hardware = hardware or (devices[0] if devices else None)
    if hardware is None:
        raise PlanError("say what hardware the plan is for")
    memory = memory_of_stages(max_memory, mesh, devices or (hardware,) * mesh.pp)
    if devices:
        own = tuple(device.memory_bytes for device in devices)
        memory = tuple(map(min, memory or own, own))
    return PlanRequest(
        mesh=mesh,
        hardware=hardware,
        objective=objective,
        sizes=tuple((sizes or {}).items()),
        memory_bytes=memory,
        pins=tuple((pin or {}).items()),
        cuts=tuple(cuts or ()),
        devices=devices,
    )


def options_of(plan: PlanData) -> dict[str, Any]:
    """Arguments of `request_for` that ask for `plan` again; hardware that is no preset is left out."""
    asked = plan.request
    devices = [{"hardware": d.hardware, "memory": d.memory} for d in asked.device_map if d.hardware in PRESETS]
    return {
        "hardware": plan.hardware if plan.hardware in PRESETS else None,
        "objective": plan.objective,
        "pin": dict(asked.pins),
        "cuts": asked.cuts,
        "max_memory": asked.max_memory or None,
        "device_map": devices if len(devices) == len(asked.device_map) and devices else None,
    }


def options_in_file(path: str | Path) -> dict[str, Any]:
    """What a plan file, perhaps edited by hand, asks for: its mesh as `tp` and `pp`, and arguments of `request_for`.

    Nothing else in the file is read, and all but `version` may be left out. Raises PlanError.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"cannot read the plan file {path}: {reason_text(error)}") from error
    if not isinstance(data, Mapping) or data.get("version") != PLAN_VERSION:
        raise PlanError(f"{path} is no plan of version {PLAN_VERSION}: make one with `autodist-fx plan --save`")
    found: dict[str, Any] = {}
    parts = {name: data.get(name, {}) for name in ("mesh", "sizes", "request")}
    for name, part in parts.items():
        if not isinstance(part, Mapping):
            raise PlanError(f"{path}: {name} is {part!r}: expected an object")
    unknown = [key for key in parts["request"] if key not in ("pins", "cuts", "max_memory", "device_map")]
    if unknown:
        raise PlanError(f"{path}: request.{unknown[0]}: unknown field; known are pins, cuts, max_memory, device_map")
    found |= {axis: parts["mesh"].get(axis, 1) for axis in ("tp", "pp")}
    found |= {"sizes": parts["sizes"], "objective": data.get("objective", "shard")}
    asked = parts["request"]
    if not asked.get("device_map"):
        found["hardware"] = data.get("hardware")
    pins, cuts = asked.get("pins", {}), asked.get("cuts", [])
    if not (isinstance(pins, Mapping) and all(isinstance(role, str) for role in pins.values())):
        raise PlanError(f"{path}: request.pins is {pins!r}: expected roles by pattern")
    if not (isinstance(cuts, list) and all(isinstance(cut, str | int) for cut in cuts)):
        raise PlanError(f"{path}: request.cuts is {cuts!r}: expected a list of modules or layer numbers")
    found |= {"pin": pins, "cuts": cuts}
    return found | {name: asked.get(name) or None for name in ("max_memory", "device_map")}


def mesh_of(plan: PlanData | None, tp: int | None, pp: int | None) -> Mesh:
    """The mesh asked for. Raises AutodistError where the plan is for another one."""
    if plan is None:
        return Mesh(1 if tp is None else tp, 1 if pp is None else pp)
    if (tp or plan.mesh.tp, pp or plan.mesh.pp) != (plan.mesh.tp, plan.mesh.pp):
        raise AutodistError(
            f"the plan is for {plan.mesh}, and {Mesh(tp or plan.mesh.tp, pp or plan.mesh.pp)} was asked for: leave tp "
            "and pp out, or make another plan"
        )
    return plan.mesh

