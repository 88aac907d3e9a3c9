"""`load`, and `Artifact`: a split on disk, as users hold it."""

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
from autodist_fx.runtime.generation.causal_lm import DistributedCausalLM
from autodist_fx.startup.from_artifact import start_from_artifact

if TYPE_CHECKING:
    from autodist_fx.simulation.simulator import Simulator


class Artifact(ArtifactReader):
    """An artifact on the disk: `plan`, `mesh`, `config`, `rank(r)`, `simulate(**inputs)`, `verify()`,
    `to_distributed()`. Files are read when they are asked for, and checked then."""

    def _repr_html_(self) -> str:
        """For notebooks: the plan."""
        return self.plan._repr_html_()

    @cached_property
    def whole(self) -> Simulator:
        """All ranks in this process, as `compile` gives them."""
        from autodist_fx.artifact.loaded_variants import load_whole  # which imports what compiles

        return load_whole(self, self._files)

    def simulate(self, **inputs: Any) -> Any:
        """All ranks in this process; see CompiledModel.simulate. AutodistError for a call that has no form here."""
        return self.whole.simulate(**inputs)

    def verify(self, *, numeric: bool = False) -> None:
        """Prove the programs on the disk against the model's graph beside them; with `numeric`, run them in float64
        against it, too. Raises VerificationError."""
        self.whole.verify()
        if numeric:
            from autodist_fx.numeric.verify_numeric import verify_numeric_of  # which imports what compiles

            verify_numeric_of(self.whole)

    def to_distributed(
        self,
        *,
        device: str | torch.device | None = None,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        rank: int | None = None,
        world_size: int | None = None,
        master_addr: str | None = None,
        master_port: int | None = None,
    ) -> DistributedCausalLM:
        """This process's share, ready to generate; see `load`."""
        options = JoinOptions(
            device=device, rank=rank, world_size=world_size, master_addr=master_addr, master_port=master_port,
            timeout=timeout,
        )  # fmt: skip
        return start_from_artifact(self, options)


def load(
    directory: str | Path,
    *,
    device: str | torch.device | None = None,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    rank: int | None = None,
    world_size: int | None = None,
    master_addr: str | None = None,
    master_port: int | None = None,
) -> Artifact | DistributedCausalLM:
    """What `compiled.save(directory)` or `autodist-fx compile --out` wrote.

    Under torchrun, or with `rank`, ... given: this process's share, on `device`, as `from_pretrained` gives it. Called
    in every process alike; each reads its own graph and weights only. Otherwise an `Artifact`, of all ranks.

    Nothing in the directory is run or unpickled; a file that is not what was written is refused by name. Raises
    ArtifactError, RuntimeSetupError.
    """
    options = JoinOptions(
        device=device, rank=rank, world_size=world_size, master_addr=master_addr, master_port=master_port,
        timeout=timeout,
    )  # fmt: skip
    try:
        artifact = Artifact(directory)
    except AutodistError as error:
        fail_to_join(error, options)
    if options.rank is None and not started_by_torchrun() and not dist.is_initialized():
        return artifact
    return start_from_artifact(artifact, options)
