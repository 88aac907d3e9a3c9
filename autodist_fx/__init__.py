"""Automatic tensor and pipeline parallelism for Hugging Face models, as a torch.fx compiler pass."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autodist_fx.artifact.load import Artifact, load
    from autodist_fx.choosing import choose_mesh
    from autodist_fx.compiled import CompiledModel
    from autodist_fx.compiling import compile
    from autodist_fx.errors import AutodistError
    from autodist_fx.pretrained import from_pretrained
    from autodist_fx.runtime.generation import DistributedCausalLM
    from cost_model.mesh_choice import MeshChoice
    from cost_model.plan import PartitionPlan

__all__ = [
    "Artifact",
    "AutodistError",
    "CompiledModel",
    "DistributedCausalLM",
    "MeshChoice",
    "PartitionPlan",
    "choose_mesh",
    "compile",
    "from_pretrained",
    "load",
]

# Imported at first use: torch and transformers take seconds, and a process that only starts ranks needs neither.
_HOMES = {
    "Artifact": "autodist_fx.artifact.load",
    "AutodistError": "autodist_fx.errors",
    "CompiledModel": "autodist_fx.compiled",
    "DistributedCausalLM": "autodist_fx.runtime.generation",
    "MeshChoice": "cost_model.mesh_choice",
    "PartitionPlan": "cost_model.plan",
    "choose_mesh": "autodist_fx.choosing",
    "compile": "autodist_fx.compiling",
    "from_pretrained": "autodist_fx.pretrained",
    "load": "autodist_fx.artifact.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
