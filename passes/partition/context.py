"""What a pass knows about the rank it works for, and what it leaves for the next: plain values, no process groups."""

from __future__ import annotations

from dataclasses import dataclass, field

from cost_model.graph.placement import Interval, Layout
from cost_model.mesh import Mesh
from cost_model.plan.data import PartitionPlan
from passes.program.gradient_sums import ParamUse


@dataclass(frozen=True, slots=True)
class ParamShard:
    """Where one parameter (or buffer) of a rank's module comes from.

    `name` is its path in the rank's GraphModule, `source` in the original model's state. The rank holds the given
    `intervals` along `dim`, concatenated; `dim` is None for the whole tensor.
    """

    name: str
    source: str
    shape: tuple[int, ...]  # of the whole source tensor
    dtype: str  # "float32", ...
    dim: int | None = None
    intervals: tuple[Interval, ...] = ()
    is_buffer: bool = False

    @property
    def local_shape(self) -> tuple[int, ...]:
        if self.dim is None:
            return self.shape
        held = sum(b - a for a, b in self.intervals)
        return (*self.shape[: self.dim], held, *self.shape[self.dim + 1 :])


@dataclass
class RankContext:
    """One rank's coordinates, the plan, and what the passes found out on the way."""

    plan: PartitionPlan
    rank: int
    param_shards: dict[str, ParamShard] = field(default_factory=dict)
    param_layouts: dict[str, Layout | None] = field(default_factory=dict)  # of the sharded dim of each parameter
    cache_layers: tuple[int, ...] = ()  # global cache layer index of each local one, set by localize_cache
    param_uses: tuple[ParamUse, ...] = ()  # of this stage, set by insert_gradient_sums

    @property
    def mesh(self) -> Mesh:
        return self.plan.mesh

    @property
    def stage(self) -> int:
        return self.mesh.coordinates(self.rank)[0]

    @property
    def tp_rank(self) -> int:
        return self.mesh.coordinates(self.rank)[1]
