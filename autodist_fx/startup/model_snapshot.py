"""Remembers a model in memory as it was when its weights were loaded: what is made of it later goes with these
weights."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from autodist_fx.errors import AutodistError
from autodist_fx.tracing.model_structure import contents_of, structure_of
from autodist_fx.weights.sources.module_source import ModuleSource
from passes.program.rank_program import RankProgram


@dataclass(frozen=True, slots=True)
class ModelSnapshot:
    """The structure and the buffers of a model; its parameters are compared with what a rank has loaded of them."""

    structure: Hashable
    buffers: Hashable

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelSnapshot:
        """Read the model as it stands."""
        return cls(structure_of(model), tuple(contents_of(buffer) for buffer in model.buffers()))

    def change(self, model: PreTrainedModel, loaded: Sequence[RankProgram]) -> AutodistError | None:
        """Return an error that says what has changed in `model` since the rank's programs `loaded` got its weights;
        None: nothing."""
        if structure_of(model) != self.structure:
            return _changed(model, "its adapters, layers, mode or config")
        if tuple(contents_of(buffer) for buffer in model.buffers()) != self.buffers:
            return _changed(model, "its buffers")
        source = ModuleSource(model, share=True)
        for program in loaded:
            held = dict(program.graph_module.named_parameters(remove_duplicate=False))
            for name, shard in program.param_shards.items():
                if name in held and not shard.is_buffer:
                    now = source.read(shard.source, shard.dim, shard.intervals, held[name].dtype)
                    if not torch.equal(held[name].detach().to(now.device), now):
                        return _changed(model, shard.source)
        return None


def _changed(model: PreTrainedModel, what: str) -> AutodistError:
    return AutodistError(
        f"{type(model).__name__} is not as it was when its ranks got their weights ({what}), and this call takes a "
        "graph that is not made yet: call to_distributed again"
    )
