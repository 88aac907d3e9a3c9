"""Translates image ops into op-graph kinds and attributes: convolutions, norms over channels, pooling, padding,
resizing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Node
from torch.nn import functional as F

from cost_model.graph.op_graph import TensorRef
from passes.fx.arguments import argument
from passes.fx.nodes import op_name
from passes.op_graph.handlers import Builder, Found, Handler, ModuleHandler, shape_of

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def _conv(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    """Translates a convolution; arguments are by position (canonicalize_calls): x, weight, bias, stride, padding,
    ..., groups."""
    transposed = node.target in _TRANSPOSED
    if not transposed and node.target not in _CONVOLUTIONS:
        return None
    builder.matmul_weights.add(inputs[1].op)
    return "conv", inputs, {"groups": argument(node, 6, "groups", 1), "transposed": transposed}


def _batch_norm(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    """Translates batch_norm(x, mean, variance, weight, bias, training, ...): each channel for itself, whether its
    statistics are given or not; but in training given ones are written."""
    if node.target is not F.batch_norm:
        return None
    given, training = argument(node, 1, "running_mean") is not None, bool(argument(node, 5, "training", False))
    return None if given and training else ("batch_norm", inputs, {"statistics": given})


def _group_norm(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    return "group_norm", inputs, {"groups": argument(node, 1, "num_groups")}


def _pool(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    name = op_name(node)
    return "pool", inputs, {"spatial": int(name[-2]), "linear": "avg" in name}


def _interpolate(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    """Translates interpolate of x [b, c, ...]: each output is a weighted sum of the positions of one channel."""
    return "pool", inputs, {"spatial": len(shape_of(node)) - 2, "linear": True}


def _pad(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    """Translates pad: the last len(pad) / 2 dims grow, on both sides."""
    pad, value = argument(node, 1, "pad"), argument(node, 3, "value")
    if not isinstance(pad, (tuple, list)):
        return None
    linear = argument(node, 2, "mode", "constant") != "constant" or not value
    return "pool", inputs, {"spatial": len(pad) // 2, "linear": bool(linear)}


def _pool_module(spatial: int, linear: bool) -> ModuleHandler:
    """Makes the handler of a module that works on each channel of an image for itself."""

    def handler(
        builder: Builder, module: torch.nn.Module, inputs: list[TensorRef], state: Mapping[str, TensorRef]
    ) -> Found:
        return None if len(inputs) != 1 or state else ("pool", inputs, {"spatial": spatial, "linear": linear})

    return handler


HANDLERS: dict[str, Handler] = {
    "conv1d": _conv, "conv2d": _conv, "conv3d": _conv, "conv_transpose1d": _conv, "conv_transpose2d": _conv,
    "conv_transpose3d": _conv,
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "avg_pool1d": _pool, "avg_pool2d": _pool, "avg_pool3d": _pool, "max_pool1d": _pool, "max_pool2d": _pool,
    "max_pool3d": _pool, "adaptive_avg_pool1d": _pool, "adaptive_avg_pool2d": _pool, "adaptive_avg_pool3d": _pool,
    "adaptive_max_pool1d": _pool, "adaptive_max_pool2d": _pool, "adaptive_max_pool3d": _pool,
    "interpolate": _interpolate, "upsample": _interpolate,
    "pad": _pad,
}  # fmt: skip
MODULES: dict[str, ModuleHandler] = {
    "AvgPool1d": _pool_module(1, True), "AvgPool2d": _pool_module(2, True), "AvgPool3d": _pool_module(3, True),
    "MaxPool1d": _pool_module(1, False), "MaxPool2d": _pool_module(2, False), "MaxPool3d": _pool_module(3, False),
    "AdaptiveAvgPool1d": _pool_module(1, True), "AdaptiveAvgPool2d": _pool_module(2, True),
    "AdaptiveAvgPool3d": _pool_module(3, True), "AdaptiveMaxPool1d": _pool_module(1, False),
    "AdaptiveMaxPool2d": _pool_module(2, False), "AdaptiveMaxPool3d": _pool_module(3, False),
}  # fmt: skip
KINDS = ("conv", "batch_norm", "group_norm", "pool")
