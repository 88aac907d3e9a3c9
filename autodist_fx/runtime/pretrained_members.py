"""`PretrainedMembers`: what libraries ask of a `PreTrainedModel` besides calling it, answered for a rank's share."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autodist_fx.errors import AutodistError, NoSuchMemberError
from cost_model.partition_plan import PartitionPlan


class PretrainedMembers(nn.Module):
    """Joins a class with `config`, `plan`, `graph_module`, `device` and `dtype`. What stands here is alike on all
    ranks, whatever a rank holds. Raises NoSuchMemberError, an AttributeError, for other members of PreTrainedModel.
    """

    base_model_prefix = ""
    is_gradient_checkpointing = False

    config: Any
    plan: PartitionPlan | None
    device: torch.device
    dtype: torch.dtype

    @property
    def name_or_path(self) -> str:
        """The checkpoint's name, as the config has it."""
        return str(getattr(self.config, "name_or_path", ""))

    @property
    def base_model(self) -> nn.Module:
        """A stand-in for the base model, to be asked and not to be called: the graphs are of the whole model."""
        return _BaseModel(self)

    @property
    def framework(self) -> str:
        """"pt", by which pipelines know PyTorch."""
        return "pt"

    @property
    def warnings_issued(self) -> dict[str, Any]:
        """Warnings that trainers have issued already."""
        return self.__dict__.setdefault("_warnings_issued", {})

    def tie_weights(self) -> None:
        """Do nothing: weights that the model ties are tied on each rank since they were loaded."""

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return how many elements the whole model's parameters have, those that its graph uses, each once. Ranks train
        none."""
        if only_trainable or self.plan is None:
            return 0
        tables = {op.weight for op in self.plan.ops if op.kind == "embedding"} if exclude_embeddings else set()
        return sum(math.prod(p.shape) for p in self.plan.params if p.name not in tables)

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the table of tokens, [vocabulary, hidden]: this rank's own where it holds all of it; else one of its
        shape and dtype without values, on meta. Raises AutodistError where the graph has none."""
        vocabulary = self.config.get_text_config().vocab_size
        tables = {op.weight for op in self.plan.ops if op.kind == "embedding"} if self.plan is not None else set()
        params = self.plan.params if self.plan is not None else ()
        found = next((p for p in params if p.name in tables and p.shape[0] >= vocabulary), None)
        if found is None:
            raise AutodistError("the ranks' graphs look no tokens up in a table")
        held = dict(self.named_parameters(remove_duplicate=False)).get(f"graph_module.{found.name}")
        is_whole = held is not None and held.shape == found.shape
        weight = held if is_whole else torch.empty(found.shape, dtype=getattr(torch, found.dtype), device="meta")
        assert weight is not None
        return nn.Embedding.from_pretrained(weight.detach())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PretrainedMembers:
        """Answer `to`, `half`, `cuda` and their like, which a rank's weights need not follow where they lie there
        already. Raises AutodistError where they do not."""
        asked = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if asked.dtype != self.dtype or asked.device != self.device:
            raise AutodistError(
                f"a rank's weights stay as they were loaded, {_dtype(self.dtype)} on {self.device}, and "
                f"{_dtype(asked.dtype)} on {asked.device} was asked for: load the model with dtype= and device= (for a "
                "pipeline device=model.device)"
            )
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            whole = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
            if name.startswith("_") or whole is None or not hasattr(whole, name):
                raise
        raise NoSuchMemberError(
            f"a model that is split over ranks has no {name}, which transformers' models have: do it with the model in "
            "one process, before it is split"
        )


class _BaseModel(nn.Module):
    """Answers for the base model inside a split model with what the split model says."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "whole", whole)  # no submodule

    def forward(self, *args: Any, **keywords: Any) -> Any:
        """Raise AutodistError: no graph ends where the base model does."""
        raise AutodistError(
            "the ranks' graphs are of the whole model: call that, with output_hidden_states=True for what its base "
            "model gives"
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["whole"], name)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
