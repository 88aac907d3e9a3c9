"""What a plan is made for: a mesh, its devices, an objective, and what the user has fixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cost_model.cuts import Cut
from cost_model.devices import DeviceMap, Memory, devices_of_stages, memory_of_stages
from cost_model.errors import PlanError
from cost_model.hardware import Hardware
from cost_model.mesh import Mesh
from cost_model.pins import Pin

# Seconds per byte of matmul weight held beyond an even share, while the search chooses. "shard": a microsecond a byte,
# so that a 16 KB matrix weighs more than dozens of collectives: who asks for tp=N asks for sharded weights. "latency"
# and "throughput": time decides alone, of one forward and of the slowest stage; on one mesh of equal devices they give
# one plan, since where stages end changes their sum by hops at most, and they differ in what choose_mesh ranks by.
# "memory": as "shard", and stages end where the fullest device is as empty as can be, not where the slowest is as fast.
PRICES = {"shard": 1e-6, "latency": 0.0, "throughput": 0.0, "memory": 1e-6}
OBJECTIVES = tuple(PRICES)


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a plan is made for.

    `sizes` maps "B" (batch), "S" (tokens per step), "P" (tokens cached before) and "E" (what an encoder reads) to
    lengths, where they are not to be the planner's own.
    `devices[k]` is what stage k runs on, where not all are `hardware`; the ranks of one stage are alike.
    `memory_bytes[k]` is what a device of stage k may hold of weights and caches (None: no limit).
    `pins`: (pattern, role) of ops (pins.py); `cuts`: where stages begin (cuts.py), () where the search decides.
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
