"""Handlers: functions that translate a call of torch into an op-graph kind, inputs and attributes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.fx
from torch.fx import Node

from cost_model.errors import PlanError
from cost_model.graph.op_graph import TensorRef
from passes.fx import node_meta

Attributes = dict[str, Any]


# (kind, tensor inputs, attributes); None where there is no rule for such a call.
Found = tuple[str, list[TensorRef], Attributes] | None


class Builder(Protocol):
    """The part of the builder that a handler may ask, and tell it beside its answer."""

    refs: dict[Node, TensorRef]  # what the nodes before this one stand for
    matmul_weights: set[str]  # ops whose output is a matmul's weight


# Of a call of a function or a method, found by the name that `op_name` gives it.
Handler = Callable[[Builder, Node, list[TensorRef]], Found]
# Of a call of a module, found by the name of its class: the module, its tensor inputs, and its own parameters and
# buffers by attribute.
ModuleHandler = Callable[[Builder, torch.nn.Module, list[TensorRef], Mapping[str, TensorRef]], Found]


def shape_of(node: Node) -> torch.Size:
    """Returns the shape of a node's tensor. Raises PlanError for what is no tensor."""
    value = node_meta.val(node)
    if not isinstance(value, torch.Tensor):
        raise PlanError(
            f"{node.name} ({node_meta.where(node)}) is a {type(value).__name__} that the model takes apart itself: "
            f"only tensors can be split; trace with use_cache=False, if it is the cache"
        )
    return value.shape
