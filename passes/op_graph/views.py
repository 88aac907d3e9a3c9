"""op_graph's words for views, and for what moves elements or puts tensors together."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch.fx import Node

from cost_model.graph.op_graph import TensorRef
from passes.fx.arguments import argument
from passes.op_graph.handlers import Builder, handles, shape_of


@handles("reshape", "view", "flatten", "unflatten", "view_as", "reshape_as")
def _view(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    if isinstance(argument(node, 1, "dtype"), torch.dtype):
        return None
    return "view", inputs[:1], {}


@handles("broadcast_to", "expand", "expand_as")
def _expand(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    return "expand", inputs[:1], {}


@handles("transpose", "swapaxes", "swapdims")
def _transpose(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    order = list(range(len(shape_of(node))))
    a, b = argument(node, 1, "dim0"), argument(node, 2, "dim1")
    order[a], order[b] = order[b], order[a]
    return "permute", inputs, {"order": tuple(order)}


@handles("permute")
def _permute(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    dims = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    rank = len(shape_of(node))
    return "permute", inputs, {"order": tuple(d % rank for d in dims)}


@handles("t")
def _t(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    return "permute", inputs, {"order": tuple(reversed(range(len(shape_of(node)))))}


@handles("unsqueeze")
def _unsqueeze(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    rank = len(shape_of(node))
    dim = argument(node, 1, "dim") % rank
    return "permute", inputs, {"order": (*range(dim), -1, *range(dim, rank - 1))}


@handles("squeeze")
def _squeeze(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    shape = shape_of(node.args[0])
    dim = argument(node, 1, "dim")
    gone = [d for d in range(len(shape)) if shape[d] == 1] if dim is None else [dim % len(shape)]
    return "permute", inputs, {"order": tuple(d for d in range(len(shape)) if d not in gone or shape[d] != 1)}


@handles("split", "chunk", "tensor_split", "split_with_sizes")
def _split(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    return "split", inputs, {"dim": argument(node, 2, "dim", 0) % len(shape_of(node.args[0]))}


@handles("unbind")
def _unbind(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    return "unbind", inputs, {"dim": argument(node, 1, "dim", 0) % len(shape_of(node.args[0]))}


@handles("cat", "concat")
def _cat(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    return "cat", inputs, {"dim": argument(node, 1, "dim", 0) % len(shape_of(node))}


@handles("stack")
def _stack(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    return "stack", inputs, {"dim": argument(node, 1, "dim", 0) % len(shape_of(node))}


@handles("repeat_interleave")
def _repeat_interleave(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    repeats, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
    if not isinstance(repeats, int) or not isinstance(dim, int):
        return None
    return "repeat_interleave", inputs, {"repeats": repeats, "dim": dim % len(shape_of(node))}
