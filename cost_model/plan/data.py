"""The partition plan as frozen data, saved and read as JSON: every decision of the two searches, and predictions."""

from __future__ import annotations

from dataclasses import dataclass, field

from cost_model.graph.placement import Interval, Layout, Placement
from cost_model.mesh import Mesh

PLAN_VERSION = 3


def rounded(seconds: float) -> float:
    """Rounds seconds to three digits, which is more than predictions are worth and keeps plan files small."""
    return float(f"{seconds:.3g}")


@dataclass(frozen=True, slots=True)
class OpPlan:
    """The plan of one op. `inputs[i]` is the placement that it wants of input i, `outputs[j]` that of output j.

    `home` is the stage it belongs to; `stages` are all that compute it (a recomputed mask has several).
    `factor` is the name of the sharded factor of its op rule ("" when it runs replicated), `role` its name in the
    field's words for linears and embeddings ("column", "row", "vocab", "replicate", "").
    `gather[j]` says that output j is also made whole on every tp rank (all_reduce of a P, all_gather of an S).
    Seconds are of one forward on the slowest tp rank, on each stage that computes it, rounded by `rounded`.
    """

    name: str
    kind: str
    home: int
    stages: tuple[int, ...]
    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    gather: tuple[bool, ...]
    factor: str = ""
    role: str = ""
    module: str = ""
    weight: str = ""  # name of the parameter that a linear multiplies by, or that an embedding reads
    # layout of each sharded dim, by position in PlanData.layouts; -1 where the tensor is not sharded
    input_layouts: tuple[int, ...] = ()
    output_layouts: tuple[int, ...] = ()
    compute_seconds: float = 0.0
    comm_seconds: float = 0.0  # the collectives that `gather` asks for
    comm_bytes: int = 0  # the whole tensors that these collectives make
    choice: int = -1  # position in PlanData.choices of the roles it could have; -1 where there is no choice

    @property
    def owner(self) -> int | None:
        """The tp rank that runs the op alone, since its tensors are on that rank alone; None where all ranks run it."""
        owners = {p.dim for p in (*self.inputs, *self.outputs) if p.is_owned}
        return owners.pop() if len(owners) == 1 else None

    @property
    def lone_bias(self) -> int | None:
        """Slot of the bias that tp rank 0 alone adds to the sum that all owe; None where there is none."""
        slot = {"row": 2, "inner": 6}.get(self.role, len(self.inputs))
        return slot if slot < len(self.inputs) else None

    @property
    def is_term(self) -> bool:
        """True if the op adds one rank's term to a sum that all ranks owe (P)."""
        return self.owner is not None and bool(self.outputs) and self.outputs[0].is_partial


@dataclass(frozen=True, slots=True)
class Alternative:
    """A role that an op could have, and how the best plan with it, all else chosen anew, compares with the plan.

    All costs of the role that the op has are 0. The search minimises seconds plus a price, its objective's, of each
    byte of a weight that ranks hold whole: so a role may be faster and yet not taken.
    """

    role: str
    seconds: float = 0.0  # change of one forward's predicted seconds, compute and collectives (negative: faster)
    weight_bytes: int = 0  # change of weight bytes, for each weight on the rank with most of it (negative: less)
    impossible: str = ""  # the reason, in words, if no plan has the role; then there are no costs


@dataclass(frozen=True, slots=True)
class ParamPlan:
    """The plan of one parameter: its placement on the tp axis, and the stages that hold it (several: tied weights)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    placement: Placement
    layout: int  # position in PlanData.layouts, -1 when replicated
    stages: tuple[int, ...]
    matmul: bool  # a weight of a matmul or a table of an embedding, as opposed to a norm's scale or a bias


HOP_CHANNELS = 1 << 24  # a hop's channel is below; those above are the runtime's (autodist_fx/runtime/comm/channels.py)


@dataclass(frozen=True, slots=True)
class Hop:
    """A tensor sent from stage `source` to stage `target`: output `index` of op `op`.

    It is sent whole, after the gather, if `whole` is True, else in the op's output placement.
    """

    op: str
    index: int
    source: int
    target: int
    channel: int
    whole: bool
    nbytes: int  # on one tp rank, at the plan's sizes


@dataclass(frozen=True, slots=True)
class CutOption:
    """A place where a cut could be while the other cuts stay, and what the stages on both sides would cost."""

    op: str  # the first op of the stage behind it
    module: str
    before_seconds: float  # the stage in front of it: compute, collectives, ops computed again, and tensors received
    after_seconds: float  # the stage behind it
    nbytes: int  # the whole tensors that cross it and depend on weights


@dataclass(frozen=True, slots=True)
class CutPlan:
    """The border between two stages that follow each other: the places next to it, in order, and which was taken."""

    options: tuple[CutOption, ...]
    chosen: int  # position in `options`


@dataclass(frozen=True, slots=True)
class StageSummary:
    """Predictions for one stage, on its slowest tp rank at the plan's sizes."""

    index: int
    layers: tuple[str, ...]  # repeated modules it runs, e.g. "model.layers.0" ... in order
    compute_seconds: float
    comm_seconds: float
    recomputed: tuple[str, ...]  # ops it computes again instead of receiving them
    flops: float
    weight_bytes: int
    kv_cache_bytes: int
    activation_bytes: int
    workspace_bytes: int  # beside inputs and outputs, for the op that needs most (costs/memory.py)
    collectives: tuple[tuple[str, int, int], ...]  # (name, count, bytes in all) per forward

    @property
    def seconds(self) -> float:
        """Compute and communication of one forward."""
        return self.compute_seconds + self.comm_seconds

    @property
    def memory_bytes(self) -> int:
        """Weights, KV cache, activations and workspace together."""
        return self.weight_bytes + self.kv_cache_bytes + self.activation_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True)
class Device:
    """The device of a stage: a preset of costs/hardware.py by name, and its memory in bytes."""

    hardware: str
    memory: int


@dataclass(frozen=True, slots=True)
class Request:
    """The decisions that the user fixed (see `autodist_fx.compile`). From them, the mesh, the hardware, the objective
    and the sizes a plan can be made anew."""

    pin: tuple[tuple[str, str], ...] = ()  # (pattern, role): see request/pins.py
    cuts: tuple[int | str, ...] = ()  # where stages 1, 2, ... begin: see request/cuts.py
    max_memory: tuple[int, ...] = ()  # by stage, bytes of weights and caches on a device; () for no limit
    device_map: tuple[Device, ...] = ()  # by stage; () where all run on the plan's hardware


@dataclass(frozen=True, slots=True)
class PlanData:
    """A partition plan: what each rank computes, holds and sends. Values only: plans with equal fields are equal."""

    mesh: Mesh
    model: str  # class name of the traced model
    fingerprint: str  # sha256 over the traced graph's ops, shapes and dtypes: a plan fits only this graph
    hardware: str
    objective: str
    sizes: tuple[tuple[str, int], ...]  # symbol -> length at which seconds and bytes were predicted
    ops: tuple[OpPlan, ...]
    params: tuple[ParamPlan, ...]
    layouts: tuple[Layout, ...]
    hops: tuple[Hop, ...]
    stages: tuple[StageSummary, ...]
    one_device_seconds: float
    device_memory_bytes: int
    choices: tuple[tuple[Alternative, ...], ...] = ()  # the roles that ops could have; equal ones of layers once
    cuts: tuple[CutPlan, ...] = ()  # the border behind each stage but the last
    warnings: tuple[str, ...] = ()
    request: Request = Request()
    version: int = PLAN_VERSION
    _by_name: dict[str, OpPlan] = field(default_factory=dict, repr=False, compare=False, init=False)

    def __post_init__(self) -> None:
        self._by_name.update((op.name, op) for op in self.ops)

    def op(self, name: str) -> OpPlan:
        """Returns the plan of one op. Raises KeyError for an unknown name."""
        return self._by_name[name]

    def has_op(self, name: str) -> bool:
        """True if the plan has an op of this name."""
        return name in self._by_name

    def layout(self, index: int) -> Layout | None:
        """Returns the layout at a position in `layouts`; None for -1."""
        return None if index < 0 else self.layouts[index]

    def memory_of_stage(self, stage: int) -> int:
        """Returns the bytes that a device of the stage may hold."""
        return self.request.max_memory[stage] if self.request.max_memory else self.device_memory_bytes

    def alternatives(self, op: OpPlan) -> tuple[Alternative, ...]:
        """Returns the roles that the op could have, its own among them; () where there is no choice."""
        return () if op.choice < 0 else self.choices[op.choice]

    @property
    def predicted_seconds(self) -> float:
        """Seconds of one forward through all stages, one after the other (latency), hops included."""
        return sum(stage.seconds for stage in self.stages)


__all__ = [
    "Alternative",
    "CutOption",
    "CutPlan",
    "Device",
    "Hop",
    "Interval",
    "OpPlan",
    "ParamPlan",
    "PlanData",
    "Request",
    "StageSummary",
    "rounded",
]
