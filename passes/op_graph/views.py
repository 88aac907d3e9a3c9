"""Translates view, permute, cat, stack and the like into op-graph kinds and attributes."""

from __future__ import annotations

import torch
import torch.fx
from torch.fx import Node

from cost_model.graph.op_graph import TensorRef
from passes.fx.arguments import argument
from passes.op_graph.handlers import Builder, Found, Handler, shape_of


def _view(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    if isinstance(argument(node, 1, "dtype"), torch.dtype):
        return None
    return "view", inputs[:1], {}


def _expand(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    return "expand", inputs[:1], {}


def _transpose(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    order = list(range(len(shape_of(node))))
    a, b = argument(node, 1, "dim0"), argument(node, 2, "dim1")
    order[a], order[b] = order[b], order[a]
    return "permute", inputs, {"order": tuple(order)}


def _permute(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    dims = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    rank = len(shape_of(node))
    return "permute", inputs, {"order": tuple(d % rank for d in dims)}


def _t(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    return "permute", inputs, {"order": tuple(reversed(range(len(shape_of(node)))))}


def _unsqueeze(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    rank = len(shape_of(node))
    dim = argument(node, 1, "dim") % rank
    return "permute", inputs, {"order": (*range(dim), -1, *range(dim, rank - 1))}


def _squeeze(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    shape = shape_of(node.args[0])
    dim = argument(node, 1, "dim")
    gone = [d for d in range(len(shape)) if shape[d] == 1] if dim is None else [dim % len(shape)]
    return "permute", inputs, {"order": tuple(d for d in range(len(shape)) if d not in gone or shape[d] != 1)}


def _split(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    return "split", inputs, {"dim": argument(node, 2, "dim", 0) % len(shape_of(node.args[0]))}


def _unbind(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    return "unbind", inputs, {"dim": argument(node, 1, "dim", 0) % len(shape_of(node.args[0]))}


def _cat(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    return "cat", inputs, {"dim": argument(node, 1, "dim", 0) % len(shape_of(node))}


def _stack(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    return "stack", inputs, {"dim": argument(node, 1, "dim", 0) % len(shape_of(node))}


def _repeat_interleave(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    repeats, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
    if not isinstance(repeats, int) or not isinstance(dim, int):
        return None
    return "repeat_interleave", inputs, {"repeats": repeats, "dim": dim % len(shape_of(node))}


HANDLERS: dict[str, Handler] = {
    "reshape": _view, "view": _view, "flatten": _view, "unflatten": _view, "view_as": _view, "reshape_as": _view,
    "broadcast_to": _expand, "expand": _expand, "expand_as": _expand,
    "transpose": _transpose, "swapaxes": _transpose, "swapdims": _transpose,
    "permute": _permute,
    "t": _t,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "split": _split, "chunk": _split, "tensor_split": _split, "split_with_sizes": _split,
    "unbind": _unbind,
    "cat": _cat, "concat": _cat,
    "stack": _stack,
    "repeat_interleave": _repeat_interleave,
}  # fmt: skip
KINDS = ("view", "expand", "permute", "split", "unbind", "cat", "stack", "repeat_interleave")
