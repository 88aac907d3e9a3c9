"""Automatic tensor and pipeline parallelism for Hugging Face models, as a torch.fx compiler pass."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from typing import TYPE_CHECKING, Any

from autodist_fx.own_packages import warn_if_shadowed

if TYPE_CHECKING:
    from autodist_fx.api.artifact import Artifact, load
    from autodist_fx.api.choose_mesh import choose_mesh
    from autodist_fx.api.choose_training import choose_training
    from autodist_fx.api.compile import compile
    from autodist_fx.api.compiled_model import CompiledModel
    from autodist_fx.api.from_pretrained import from_pretrained
    from autodist_fx.api.train import train
    from autodist_fx.errors import AutodistError
    from autodist_fx.runtime.distributed_model import DistributedModel
    from autodist_fx.runtime.generation.causal_lm import DistributedCausalLM
    from autodist_fx.trainer.trainer import EngineTrainer, Trainer
    from autodist_fx.training.engine import Engine, Resumed, StepResult
    from cost_model.partition_plan import PartitionPlan
    from cost_model.search.mesh_choice import MeshChoice
    from cost_model.training.choice import TrainingChoice

__all__ = [
    "Artifact",
    "AutodistError",
    "CompiledModel",
    "DistributedCausalLM",
    "DistributedModel",
    "Engine",
    "EngineTrainer",
    "MeshChoice",
    "PartitionPlan",
    "Resumed",
    "StepResult",
    "Trainer",
    "TrainingChoice",
    "choose_mesh",
    "choose_training",
    "compile",
    "from_pretrained",
    "load",
    "train",
]

# Imported at first use: torch and transformers take seconds, and a process that only starts ranks needs neither.
_HOMES = {
    "Artifact": "autodist_fx.api.artifact",
    "AutodistError": "autodist_fx.errors",
    "CompiledModel": "autodist_fx.api.compiled_model",
    "DistributedCausalLM": "autodist_fx.runtime.generation.causal_lm",
    "DistributedModel": "autodist_fx.runtime.distributed_model",
    "Engine": "autodist_fx.training.engine",
    "EngineTrainer": "autodist_fx.trainer.trainer",
    "MeshChoice": "cost_model.search.mesh_choice",
    "PartitionPlan": "cost_model.partition_plan",
    "Resumed": "autodist_fx.training.engine",
    "StepResult": "autodist_fx.training.engine",
    "Trainer": "autodist_fx.trainer.trainer",
    "TrainingChoice": "cost_model.training.choice",
    "choose_mesh": "autodist_fx.api.choose_mesh",
    "choose_training": "autodist_fx.api.choose_training",
    "compile": "autodist_fx.api.compile",
    "from_pretrained": "autodist_fx.api.from_pretrained",
    "load": "autodist_fx.api.artifact",
    "train": "autodist_fx.api.train",
}


# Package, the first version that works, the first that does not; as in pyproject.toml.
_WORKS_WITH = (("torch", (2, 7), None), ("transformers", (4, 57), (6, 0)))


def _check_versions() -> None:
    """Raise ImportError where a package is installed in a version that nothing here was written for."""
    for package, first, end in _WORKS_WITH:
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a copy on PYTHONPATH, or none: its own import will tell
            continue
        numbers = tuple(map(int, re.findall(r"\d+", found)[:2]))
        if numbers < first or (end is not None and numbers >= end):
            wanted = f"{package}>={first[0]}.{first[1]}" + (f",<{end[0]}" if end else "")
            raise ImportError(f"autodist_fx needs {wanted}, and {found} is installed: pip install '{wanted}'")


_check_versions()
warn_if_shadowed()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
