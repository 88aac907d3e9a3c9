"""What a plan is made for: a mesh, its devices, an objective, and what the user has fixed."""

from __future__ import annotations

from dataclasses import dataclass

from cost_model.costs.hardware import Hardware
from cost_model.errors import PlanError
from cost_model.mesh import Mesh
from cost_model.plan.data import PlanData
from cost_model.request.cuts import Cut
from cost_model.request.pins import Pin

# Seconds per byte of matmul weight held beyond an even share, while the search chooses. "shard": a microsecond a byte,
# so that a 16 KB matrix weighs more than dozens of collectives: who asks for tp=N asks for sharded weights. "latency"
# and "throughput": time decides alone, of one forward and of the slowest stage; on one mesh of equal devices they give
# one plan, since where stages end changes their sum by hops at most, and they differ in what choose_mesh ranks by.
# "memory": as "shard", and stages end where the fullest device is as empty as can be, not where the slowest is as fast.
PRICES = {"shard": 1e-6, "latency": 0.0, "throughput": 0.0, "memory": 1e-6}
OBJECTIVES = tuple(PRICES)


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a plan is made for; `PlanOptions.resolve` makes it of what users write.

    `sizes` maps "B" (batch), "S" (tokens per step), "P" (tokens cached before) and "E" (what an encoder reads) to
    lengths, where they are not to be the planner's own.
    `devices[k]` is what stage k runs on, where not all are `hardware`; the ranks of one stage are alike.
    `max_memory[k]` is what a device of stage k may hold of weights and caches, in bytes (None: no limit).
    `pin`: (pattern, role) of ops (pins.py); `cuts`: where stages begin (cuts.py), () where the search decides.
    `like`: a plan for another graph of the model, whose weights and caches are to lie as in that one (like_plan.py).
    `strict`: a plan with ops that have no sharding rule is refused (missing_rules.py).
    `in_flight`: micro-batches whose caches a stage holds at once; as many as stages keep a pipeline full.
    """

    mesh: Mesh
    hardware: Hardware
    objective: str = "shard"
    sizes: tuple[tuple[str, int], ...] = ()
    max_memory: tuple[int, ...] | None = None
    pin: tuple[Pin, ...] = ()
    cuts: tuple[Cut, ...] = ()
    devices: tuple[Hardware, ...] = ()
    in_flight: int = 1
    like: PlanData | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.objective not in PRICES:
            raise PlanError(f"no objective {self.objective!r}: choose one of {', '.join(PRICES)}")
        for name, given in (("devices", self.devices or None), ("max_memory", self.max_memory)):
            if given is not None and len(given) != self.mesh.pp:
                raise PlanError(f"{len(given)} {name} for pp={self.mesh.pp}: give one for each stage")

    @property
    def stage_devices(self) -> tuple[Hardware, ...]:
        return self.devices or (self.hardware,) * self.mesh.pp
