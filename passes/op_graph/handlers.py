"""How op_graph calls an fx target in the cost model's words: one function for each, found by the target's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.fx
from torch.fx import Node

from cost_model.errors import PlanError
from cost_model.graph.op_graph import TensorRef

Attributes = dict[str, Any]


class Builder(Protocol):
    """What a handler may tell the builder beside its answer."""

    matmul_weights: set[str]  # ops whose output is a matmul's weight


Handler = Callable[[Builder, Node, list[TensorRef]], tuple[str, list[TensorRef], Attributes] | None]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def shape_of(node: Node) -> torch.Size:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        raise PlanError(
            f"{node.name} ({node.meta.get('source')}) is a {type(value).__name__} that the model takes apart itself: "
            f"only tensors can be split; trace with use_cache=False, if it is the cache"
        )
    return value.shape
