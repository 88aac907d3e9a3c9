"""The planner's input beside the graph: a mesh, its devices, an objective, and what the user has fixed."""

from __future__ import annotations

from dataclasses import dataclass

from cost_model.costs.hardware import Hardware
from cost_model.errors import PlanError
from cost_model.mesh import Mesh
from cost_model.plan.data import PlanData
from cost_model.request.cuts import Cut
from cost_model.request.pins import Pin

# Objective -> price, in seconds, of each byte of matmul weight that a rank holds beyond an even share.
#   shard        a microsecond a byte, so that a 16 KB matrix weighs more than dozens of collectives: users who ask for
#                tp=N ask for sharded weights
#   latency,     time alone decides, of one forward or of the slowest stage. On one mesh of equal devices both give the
#   throughput   same plan, since moving a cut changes the sum of the stages by hops at most; choose_mesh ranks meshes
#                by the one or the other
#   memory       as shard, but cuts make the fullest device as empty as can be, not the slowest stage as fast as can be
PRICES = {"shard": 1e-6, "latency": 0.0, "throughput": 0.0, "memory": 1e-6}
OBJECTIVES = tuple(PRICES)
USABLE = 0.9  # share of a device's memory: the rest is for its context, the allocator and collectives (vLLM's default)


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """A request for one plan, resolved and checked; `PlanOptions.resolve` makes it from what users write.

    `sizes` overrides default lengths (search/prediction_sizes.py) of "B" (batch), "S" (tokens per step), "P" (tokens
    cached before) and "E" (what an encoder reads).
    `devices[k]` is the hardware of stage k, () if all stages run on `hardware`; the ranks of one stage are alike.
    `max_memory[k]` is the limit, in bytes, of weights and caches on a device of stage k (None: no limit).
    `pin`: (pattern, role) of ops (pins.py); `cuts`: where stages begin (cuts.py), () to leave them to the search.
    `like`: a plan of another variant of the model: weights and caches are to lie as in that plan (like_plan.py).
    `strict`: refuses a plan with ops that have no sharding rule (plan/missing_rules.py).
    `in_flight`: micro-batches whose caches a stage holds at once; as many as there are stages keep a pipeline full.
    `ranks_at_once`: ranks that compute at a time, on a machine whose cores and memory they share; 0: those of a stage,
    which stages that wait for each other take turns with.

    Raises PlanError for an unknown objective, and for `devices` or `max_memory` that are not one for each stage.
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
    ranks_at_once: int = 0
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
        """The hardware of each stage, pp entries."""
        return self.devices or (self.hardware,) * self.mesh.pp

    @property
    def limits(self) -> tuple[int, ...]:
        """The bytes that a device of each stage may hold in all: `max_memory`, else USABLE of its memory."""
        return self.max_memory or tuple(int(USABLE * device.memory_bytes) for device in self.stage_devices)
