"""Scores that choose experts are computed whole; what the experts compute is not."""

from __future__ import annotations

from cost_model.graph.op_graph import Op, OpGraph, TensorRef, TensorSpec
from cost_model.layouts.routing import deciding_ops


def test_the_product_in_front_of_a_choice_and_its_weight() -> None:
    def op(name: str, kind: str, *inputs: str, shape: tuple[int, ...] = (4, 8)) -> Op:
        return Op(name, kind, tuple(map(TensorRef, inputs)), (TensorSpec(shape, "float32"),))

    graph = OpGraph(
        [
            op("x", "input"), op("up", "param", shape=(8, 8)), op("h", "linear", "x", "up"),
            op("router", "param", shape=(8, 8)), op("cast", "to", "router"), op("scores", "linear", "h", "cast"),
            op("shares", "softmax", "scores"), op("chosen", "opaque.topk", "shares"), op("out", "linear", "h", "up"),
        ],
        [TensorRef("out")],
    )  # fmt: skip
    assert deciding_ops(graph) == {"shares", "scores", "cast", "router"}
