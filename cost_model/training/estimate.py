"""Predicts a training step of a plan on a schedule: seconds and what they go to, bytes on each pipeline rank.

    step = the schedule's timeline + gradients over replicas, as far as backward does not hide them + clipping + AdamW

The gradients of a rank are added up over dp by ring all_reduces (or, with ZeRO-1, reduce_scatters now and all_gathers
of the weights behind the optimizer: the same bytes; S. Rajbhandari et al., "ZeRO", SC 2020, section 7) while its last
microbatch goes backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cost_model.costs.communication import all_reduce_seconds
from cost_model.costs.hardware import Hardware
from cost_model.mesh import Mesh
from cost_model.partition_plan import PartitionPlan
from cost_model.schedule.schedule import ActionKind, Schedule
from cost_model.schedule.timeline import Timeline, simulate
from cost_model.training.stage_work import StageWork, WorkAnalysis


@dataclass(frozen=True, slots=True)
class StepSetup:
    """How a step is run: on which mesh, in which order, `rows` sequences a microbatch.

    `recompute` is "none", or "layers": the layers' activations are computed again in backward. `zero_stage` 1: each
    replica holds and steps 1 / dp of the optimizer's states. `has_masters`: 16-bit parameters are stepped as float32
    copies, with float32 gradients.
    """

    mesh: Mesh
    schedule: Schedule
    rows: int
    recompute: str = "none"
    zero_stage: int = 0
    has_masters: bool = False


def state_bytes(has_masters: bool) -> int:
    """Returns the bytes of AdamW's states a byte of parameters: two tensors like them, or the float32 copy and both."""
    return 6 if has_masters else 2


def gradient_bytes(has_masters: bool) -> int:
    """Returns the bytes of gradients a byte of parameters."""
    return 2 if has_masters else 1


@dataclass(frozen=True, slots=True)
class RankMemory:
    """The bytes that a pipeline rank's fullest tp rank holds at the worst moment of a step."""

    weights: int  # parameters and buffers
    gradients: int
    optimizer: int
    activations: int  # kept from forward to backward, of all microbatches that are under way
    transient: int  # while one op, or with recomputation one layer, goes backward

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.transient


@dataclass(frozen=True, slots=True)
class StepEstimate:
    """A predicted step. `memory[r]` is pipeline rank r's; seconds are those of the slowest rank."""

    plan: PartitionPlan
    setup: StepSetup
    timeline: Timeline
    memory: tuple[RankMemory, ...]
    reduce_seconds: float  # gradients over dp and tp that no backward pass hides
    optimizer_seconds: float  # clipping by the whole norm, and the optimizer

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return self.timeline.seconds + self.reduce_seconds + self.optimizer_seconds

    @property
    def rows(self) -> int:
        """Sequences of the whole batch."""
        return self.setup.rows * self.setup.schedule.microbatches * self.setup.mesh.dp

    @property
    def tokens_per_second(self) -> float:
        """Tokens (sequences, for a model without tokens) of all replicas."""
        return self.rows * dict(self.plan.sizes).get("S", 1) / self.seconds

    @property
    def memory_bytes(self) -> int:
        """Bytes on the fullest rank."""
        return max(memory.total for memory in self.memory)

    def to_dict(self) -> dict[str, Any]:
        """Returns the estimate as JSON-ready values."""
        mesh, setup = self.setup.mesh, self.setup
        return {
            "tp": mesh.tp,
            "pp": mesh.pp,
            "dp": mesh.dp,
            "schedule": setup.schedule.name,
            "stages_per_rank": setup.schedule.stages // setup.schedule.ranks,
            "microbatches": setup.schedule.microbatches,
            "rows": setup.rows,
            "recompute": setup.recompute,
            "zero_stage": setup.zero_stage,
            "seconds": self.seconds,
            "idle_share": self.timeline.idle_share,
            "reduce_seconds": self.reduce_seconds,
            "optimizer_seconds": self.optimizer_seconds,
            "tokens_per_second": self.tokens_per_second,
            "memory_bytes": self.memory_bytes,
            "memory": [asdict(memory) for memory in self.memory],
        }


def estimate_step(analysis: WorkAnalysis, setup: StepSetup) -> StepEstimate:
    """Predicts a step of the plan behind `analysis`, whose stages are those of the setup's schedule."""
    schedule, mesh = setup.schedule, setup.mesh
    work = [analysis.stage(k, recompute=setup.recompute == "layers") for k in range(schedule.stages)]
    timeline = simulate(schedule, [w.costs for w in work], analysis.transfers(mesh))
    reducing = stepping = 0.0
    memory: list[RankMemory] = []
    for rank in range(schedule.ranks):
        own = [work[stage] for stage in schedule.stages_of(rank)]
        hardware = analysis.hardware[schedule.stages_of(rank)[0]]
        reducing = max(reducing, _reduce_seconds(own, setup, hardware))
        stepping = max(stepping, _optimizer_seconds(own, setup, hardware))
        memory.append(_memory(own, setup, timeline.rank_activation_bytes[rank]))
    return StepEstimate(analysis.plan, setup, timeline, tuple(memory), reducing, stepping)


def _memory(own: Sequence[StageWork], setup: StepSetup, activations: int) -> RankMemory:
    parameters = sum(w.parameter_bytes for w in own)
    states = parameters * state_bytes(setup.has_masters)
    return RankMemory(
        weights=parameters + sum(w.buffer_bytes for w in own),
        gradients=parameters * gradient_bytes(setup.has_masters),
        optimizer=-(-states // setup.mesh.dp) if setup.zero_stage else states,
        activations=activations,
        transient=max(w.transient_bytes for w in own),
    )


def _reduce_seconds(own: Sequence[StageWork], setup: StepSetup, hardware: Hardware) -> float:
    """Returns the seconds of a rank's sums over dp that its last backward pass does not hide, and of those over tp."""
    mesh = setup.mesh
    gradients = gradient_bytes(setup.has_masters) * sum(w.parameter_bytes for w in own)
    over_dp = all_reduce_seconds(gradients, mesh.dp, hardware.dp_link_on(mesh))
    hidden = min(w.costs.seconds(ActionKind.BACKWARD) for w in own)
    over_tp = all_reduce_seconds(sum(w.owed_bytes for w in own), mesh.tp, hardware.tp_link_on(mesh))
    return max(0.0, over_dp - hidden) + over_tp


def _optimizer_seconds(own: Sequence[StageWork], setup: StepSetup, hardware: Hardware) -> float:
    """Returns the seconds of clipping (gradients read, then scaled) and of the optimizer (all read, and all but the
    gradients written): both are bound by memory."""
    parameters = sum(w.parameter_bytes for w in own)
    gradients = parameters * gradient_bytes(setup.has_masters)
    clipping = 3 * gradients
    stepping = 2 * parameters + gradients + 2 * parameters * state_bytes(setup.has_masters)
    share = 1 / setup.mesh.dp if setup.zero_stage else 1.0
    return hardware.stream_seconds(clipping + stepping * share, "adamw")
