"""Translates losses over classes into op-graph kinds and attributes."""

from __future__ import annotations

from torch.fx import Node
from torch.nn import functional as F

from cost_model.graph.op_graph import TensorRef
from passes.fx import node_meta
from passes.fx.arguments import argument
from passes.op_graph.handlers import Builder, Found, Handler
from passes.ops.losses import cross_entropy_part

_OTHER = {2: "weight", 3: "size_average", 5: "reduce"}
_SETTINGS = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}


def _cross_entropy(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    """Translates cross_entropy of classes' numbers, and a rank's part of it; not with classes that weigh otherwise than
    others, nor with shares of all classes as the target."""
    settings = loss_settings(node)
    if settings is None or len(inputs) != 2:
        return None
    scores, target = argument(node, 0, "input"), argument(node, 1, "target")
    if node_meta.tensor(scores).dim() < 2 or node_meta.tensor(target).is_floating_point():
        return None
    return "cross_entropy", inputs, settings


def loss_settings(node: Node) -> dict[str, int | float | str] | None:
    """Returns how a cross_entropy, or a rank's part of one, is computed; None where numbers of the graph say so."""
    if node.target is not cross_entropy_part:
        if node.target is not F.cross_entropy or not node.args:
            return None
        if any(argument(node, at, name) is not None for at, name in _OTHER.items()):
            return None
    places = (4, 6, 7)  # the same in both
    given = {name: argument(node, at, name, _SETTINGS[name]) for at, name in zip(places, _SETTINGS, strict=True)}
    return None if any(isinstance(value, Node) for value in given.values()) else given


HANDLERS: dict[str, Handler] = {"cross_entropy": _cross_entropy, "cross_entropy_part": _cross_entropy}
KINDS = ("cross_entropy",)
