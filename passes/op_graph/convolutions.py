"""op_graph's words for what works on images: convolutions, norms over channels, pooling, padding, resizing."""

from __future__ import annotations

from typing import Any

from torch.fx import Node
from torch.nn import functional as F

from cost_model.graph.op_graph import TensorRef
from passes.fx.arguments import argument
from passes.fx.nodes import op_name
from passes.op_graph.handlers import Builder, handles, shape_of

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@handles("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    """Arguments are by position (spell_out_calls): x, weight, bias, stride, padding, ..., groups."""
    transposed = node.target in _TRANSPOSED
    if not transposed and node.target not in _CONVOLUTIONS:
        return None
    builder.matmul_weights.add(inputs[1].op)
    return "conv", inputs, {"groups": argument(node, 6, "groups", 1), "transposed": transposed}


@handles("batch_norm")
def _batch_norm(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    """x, mean, variance, weight, bias, training, ...: each channel for itself, whether its statistics are given or not;
    but in training given ones are written."""
    if node.target is not F.batch_norm:
        return None
    given, training = argument(node, 1, "running_mean") is not None, bool(argument(node, 5, "training", False))
    return None if given and training else ("batch_norm", inputs, {"statistics": given})


@handles("group_norm")
def _group_norm(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    return "group_norm", inputs, {"groups": argument(node, 1, "num_groups")}


@handles(
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
)  # fmt: skip
def _pool(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    name = op_name(node)
    return "pool", inputs, {"spatial": int(name[-2]), "linear": "avg" in name}


@handles("interpolate", "upsample")
def _interpolate(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    """[b, c, ...]: weighted sums of the positions of one channel."""
    return "pool", inputs, {"spatial": len(shape_of(node)) - 2, "linear": True}


@handles("pad")
def _pad(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    """The last len(pad) / 2 dims grow, on both sides."""
    pad, value = argument(node, 1, "pad"), argument(node, 3, "value")
    if not isinstance(pad, (tuple, list)):
        return None
    linear = argument(node, 2, "mode", "constant") != "constant" or not value
    return "pool", inputs, {"spatial": len(pad) // 2, "linear": bool(linear)}


# nn modules that work on each channel of an image for itself
POOLS = {
    f"{adaptive}{what}Pool{n}d": {"spatial": n, "linear": what == "Avg"}
    for adaptive in ("", "Adaptive") for what in ("Avg", "Max") for n in (1, 2, 3)
}  # fmt: skip
