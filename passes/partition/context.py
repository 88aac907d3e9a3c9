"""The context of a rank's passes: what they know about the rank, and what each leaves for the next; no process
groups."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from cost_model.graph.placement import Layout
from cost_model.mesh import Mesh
from cost_model.plan.data import PlanData
from passes.fx.node_meta import Phase
from passes.fx.run_passes import PassContext
from passes.program.gradient_sums import ParamUse
from passes.program.param_shard import ParamShard


@dataclass
class RankContext(PassContext):
    """One rank's coordinates, the plan, and what the passes found out on the way."""

    phase: Phase = field(default=Phase.PARTITIONED, init=False)
    plan: PlanData
    rank: int
    param_shards: dict[str, ParamShard] = field(default_factory=dict)
    param_layouts: dict[str, Layout | None] = field(default_factory=dict)  # of the sharded dim of each parameter
    # (op, output index) of a tensor from another stage -> the nodes that receive it, set by extract_stage
    received: dict[tuple[str, int], tuple[Node, ...]] = field(default_factory=dict)
    cache_layers: tuple[int, ...] = ()  # global cache layer index of each local one, set by localize_cache
    length_kinds: tuple[str, ...] = ()  # of the layers behind them, which count tokens and hold nothing; by the same
    param_uses: tuple[ParamUse, ...] = ()  # of this stage, set by insert_gradient_sums

    @property
    def mesh(self) -> Mesh:
        """Returns the plan's mesh."""
        return self.plan.mesh

    @property
    def stage(self) -> int:
        """Returns the pipeline stage of the rank, from 0."""
        return self.mesh.coordinates(self.rank)[0]

    @property
    def tp_rank(self) -> int:
        """Returns the place of the rank in its stage's tp group, from 0."""
        return self.mesh.coordinates(self.rank)[1]
