"""Translates random ops into op-graph kinds and attributes."""

from __future__ import annotations

from torch.fx import Node

from cost_model.graph.op_graph import TensorRef
from passes.fx.arguments import argument
from passes.op_graph.handlers import Builder, Found, Handler


def _dropout(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    """Translates seeded_dropout; its number among the graph's random ops is no attribute: all layers' are alike."""
    return "dropout", inputs[:2], {"p": argument(node, 3, "p"), "drawn": argument(node, 4, "drawn")}


HANDLERS: dict[str, Handler] = {"seeded_dropout": _dropout}
KINDS = ("dropout",)
