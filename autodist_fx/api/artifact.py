"""`load`, and `Artifact`: a saved split as users hold it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from autodist_fx.artifact.reader import ArtifactReader
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.join_options import DEFAULT_TIMEOUT_SECONDS, JoinOptions
from autodist_fx.runtime.comm.process_group import fail_to_join, started_by_torchrun
from autodist_fx.runtime.microbatches.count import Microbatches, checked
from autodist_fx.startup.build_model import RankModel
from autodist_fx.startup.from_artifact import start_from_artifact

if TYPE_CHECKING:
    from autodist_fx.simulation.simulator import Simulator


class Artifact(ArtifactReader):
    """A split on disk: `plan`, `mesh`, `config`, `rank(r)`, `simulate(**inputs)`, `verify()`, `to_distributed()`.

    Each file is read when it is first needed, and checked against its digest then.
    """

    def _repr_html_(self) -> str:
        """Return the plan as HTML, for notebooks."""
        return self.plan._repr_html_()

    @cached_property
    def whole(self) -> Simulator:
        """All ranks in this process, as a `Simulator`. Every file is read. Raises ArtifactError."""
        from autodist_fx.artifact.loaded_variants import load_whole  # imports the compiler, which a rank does without

        return load_whole(self, self._files)

    def simulate(self, *args: Any, **inputs: Any) -> Any:
        """Run all ranks in this process; see CompiledModel.simulate.
        Raises AutodistError for a call that no saved variant takes."""
        return self.whole.simulate(*args, **inputs)

    def verify(self, *, numeric: bool = False) -> None:
        """Prove the saved programs against the model's graph that is saved beside them; with `numeric`, also run both
        in float64 and compare. Raises VerificationError."""
        self.whole.verify()
        if numeric:
            from autodist_fx.numeric.verify_numeric import verify_numeric_of  # imports the compiler, too

            verify_numeric_of(self.whole)

    def to_distributed(
        self,
        *,
        device: str | torch.device | None = None,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        microbatches: Microbatches = "auto",
        cuda_graphs: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        master_addr: str | None = None,
        master_port: int | None = None,
    ) -> RankModel:
        """Start this process as its rank of the mesh, ready to generate; the
        arguments are those of `load`. Raises ArtifactError, RuntimeSetupError."""
        options = JoinOptions(device, rank, world_size, master_addr, master_port, timeout, cuda_graphs)
        return _started(self, options, microbatches)


def load(
    directory: str | Path,
    *,
    device: str | torch.device | None = None,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    microbatches: Microbatches = "auto",
    cuda_graphs: bool = False,
    rank: int | None = None,
    world_size: int | None = None,
    master_addr: str | None = None,
    master_port: int | None = None,
) -> Artifact | RankModel:
    """Read the artifact that `compiled.save(directory)` or `autodist-fx compile --out` wrote.

    Under torchrun, or with `rank`, ... given, returns this process's rank of the model on `device`, like
    `from_pretrained`, whose `microbatches` this is, too. Every process calls it alike; each reads its own graph and
    weights only. Otherwise returns an
    `Artifact`, which has all ranks. `timeout` is in seconds, per wait for another rank.

    Nothing in the directory is run or unpickled; a file whose digest is not the manifest's is refused by name. Raises
    ArtifactError, RuntimeSetupError.
    """
    options = JoinOptions(device, rank, world_size, master_addr, master_port, timeout, cuda_graphs)
    try:
        artifact = Artifact(directory)
    except AutodistError as error:
        fail_to_join(error, options)
    if options.rank is None and not started_by_torchrun() and not dist.is_initialized():
        return artifact
    return _started(artifact, options, microbatches)


def _started(artifact: Artifact, options: JoinOptions, microbatches: Microbatches) -> RankModel:
    try:
        in_flight = checked(microbatches)
    except AutodistError as error:
        fail_to_join(error, options)
    model = start_from_artifact(artifact, options)
    model.microbatches = in_flight
    return model
