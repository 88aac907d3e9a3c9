"""The mesh: a grid of pipeline stages x data-parallel replicas x tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass

from cost_model.errors import MeshError


@dataclass(frozen=True, slots=True)
class Mesh:
    """A `pp` x `dp` x `tp` grid of ranks. Global rank = (stage * dp + dp_rank) * tp + tp_rank, so that the ranks of a
    tp group are neighbours.

    `dp`: replicas of the model, each of which trains on rows of its own. Plans and programs are of one replica, a mesh
    of dp=1 (`replica`). Raises MeshError for an axis that is no whole number of ranks, 1 or more.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        for axis, size in (("tp", self.tp), ("pp", self.pp), ("dp", self.dp)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise MeshError(f"mesh axis {axis} must be a whole number of ranks, 1 or more; got {size!r}")

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.dp

    @property
    def replica(self) -> Mesh:
        """The mesh of one replica of the model, for which plans and programs are made."""
        return Mesh(self.tp, self.pp)

    def rank(self, stage: int, tp_rank: int, dp_rank: int = 0) -> int:
        """Returns the global rank at (stage, dp_rank, tp_rank). Raises MeshError outside of the mesh."""
        if not (0 <= stage < self.pp and 0 <= tp_rank < self.tp and 0 <= dp_rank < self.dp):
            replica = f", dp rank {dp_rank}" if self.dp > 1 or dp_rank else ""
            raise MeshError(f"no rank at stage {stage}{replica}, tp rank {tp_rank} on a mesh of {self}")
        return (stage * self.dp + dp_rank) * self.tp + tp_rank

    def coordinates(self, rank: int) -> tuple[int, int]:
        """Returns (stage, tp_rank) of a global rank. Raises MeshError outside of the mesh."""
        if not 0 <= rank < self.size:
            ranks = f"{self.size} rank{'s' if self.size > 1 else ''}"
            raise MeshError(f"rank {rank} is not on a mesh of {self} ({ranks})")
        return rank // (self.dp * self.tp), rank % self.tp

    def dp_rank(self, rank: int) -> int:
        """Returns the replica that a global rank belongs to. Raises MeshError outside of the mesh."""
        self.coordinates(rank)
        return rank // self.tp % self.dp

    def tp_group(self, stage: int, dp_rank: int = 0) -> tuple[int, ...]:
        """Returns the global ranks of a stage of one replica, which share its tensors, in order."""
        return tuple(self.rank(stage, t, dp_rank) for t in range(self.tp))

    def dp_group(self, rank: int) -> tuple[int, ...]:
        """Returns the global ranks that hold what `rank` holds, one for each replica, in order."""
        stage, tp_rank = self.coordinates(rank)
        return tuple(self.rank(stage, tp_rank, d) for d in range(self.dp))

    def column(self, rank: int) -> tuple[int, ...]:
        """Returns the global ranks that have the dp rank and the tp rank of `rank`, one for each stage, in order."""
        _, tp_rank = self.coordinates(rank)
        return tuple(self.rank(stage, tp_rank, self.dp_rank(rank)) for stage in range(self.pp))

    def __str__(self) -> str:
        return f"tp={self.tp} x pp={self.pp}" + (f" x dp={self.dp}" if self.dp > 1 else "")
