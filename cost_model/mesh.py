"""The mesh: a grid of pipeline stages x tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass

from cost_model.errors import MeshError


@dataclass(frozen=True, slots=True)
class Mesh:
    """A `pp` x `tp` grid of ranks. Global rank = stage * tp + tp_rank, so that the ranks of a tp group are neighbours.

    Raises MeshError for an axis that is no whole number of ranks, 1 or more.
    """

    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for axis, size in (("tp", self.tp), ("pp", self.pp)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise MeshError(f"mesh axis {axis} must be a whole number of ranks, 1 or more; got {size!r}")

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp

    def rank(self, stage: int, tp_rank: int) -> int:
        """Returns the global rank at (stage, tp_rank). Raises MeshError outside of the mesh."""
        if not (0 <= stage < self.pp and 0 <= tp_rank < self.tp):
            raise MeshError(f"no rank at stage {stage}, tp rank {tp_rank} on a mesh of tp={self.tp} x pp={self.pp}")
        return stage * self.tp + tp_rank

    def coordinates(self, rank: int) -> tuple[int, int]:
        """Returns (stage, tp_rank) of a global rank. Raises MeshError outside of the mesh."""
        if not 0 <= rank < self.size:
            ranks = f"{self.size} rank{'s' if self.size > 1 else ''}"
            raise MeshError(f"rank {rank} is not on a mesh of tp={self.tp} x pp={self.pp} ({ranks})")
        return divmod(rank, self.tp)

    def tp_group(self, stage: int) -> tuple[int, ...]:
        """Returns the global ranks of a stage, which share its tensors, in order."""
        return tuple(self.rank(stage, t) for t in range(self.tp))

    def column(self, rank: int) -> tuple[int, ...]:
        """Returns the global ranks that have the tp rank of `rank`, one for each stage, in order."""
        return tuple(self.rank(stage, self.coordinates(rank)[1]) for stage in range(self.pp))

    def __str__(self) -> str:
        return f"tp={self.tp} x pp={self.pp}"
