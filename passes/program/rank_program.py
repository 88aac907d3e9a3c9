"""RankProgram: what the passes return for one rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.fx

from cost_model.mesh import Mesh
from passes.program.gradient_sums import GradSum, ParamUse
from passes.program.param_shard import ParamShard
from passes.program.row_division import UNKNOWN, RowDivision


@dataclass
class RankProgram:
    """One rank's graph and what it needs to run.

    The graph takes every input of the traced model by name (a stage that does not need one ignores it) and returns a
    dict of the outputs that this rank has: all of them on the last stage, none or the cache alone elsewhere.
    Parameters are on the meta device, in their local shapes, until `param_shards` are loaded into them.
    """

    rank: int
    mesh: Mesh
    graph_module: torch.fx.GraphModule
    input_names: tuple[str, ...]
    param_shards: Mapping[str, ParamShard]  # by name in graph_module
    cache_layers: tuple[int, ...]  # the global cache layer behind each local one
    cache_kinds: tuple[str, ...] = ()  # what each local one is: "full", "sliding:4096", "cross"
    # kinds whose lengths the graph asks for and of which the stage has no layer: each is a layer without numbers behind
    # the others, in this order, which whoever runs the program lets count the tokens
    length_kinds: tuple[str, ...] = ()
    grad_sums: tuple[GradSum, ...] | None = None  # owed after a backward pass; None: the program has none
    # what each stage does with its parameters, as far as emitting this program found out; only of one to be trained
    stage_uses: Mapping[int, tuple[ParamUse, ...]] = field(default_factory=dict)
    # where a batch may be cut into parts that run one after the other; of a pipeline's programs alone
    rows: RowDivision = UNKNOWN
    whole_steps: str = UNKNOWN.reason  # why a step's tokens are to be run at once; "" where they may be run in parts

    @property
    def stage(self) -> int:
        """Returns the rank's pipeline stage, from 0."""
        return self.mesh.coordinates(self.rank)[0]

    @property
    def tp_rank(self) -> int:
        """Returns the rank's place in its stage's tp group, from 0."""
        return self.mesh.coordinates(self.rank)[1]

    @property
    def weight_bytes(self) -> int:
        """Returns the bytes of this rank's parameters and buffers."""
        state = self.graph_module.state_dict()
        return sum(t.numel() * t.element_size() for t in state.values())
