"""op_graph: what torch's ops are in the cost model's words, above all which dims they work along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cost_model.graph.op_graph import Op, TensorRef
from cost_model.rules.table import RULES
from passes.op_graph.build import build_op_graph, fingerprint
from tests.support.graphs.small import (
    Attention,
    Ids,
    Mlp,
    Stack,
    assert_split_equals_whole,
    normalized,
    op_graph_of,
    plan_for,
)


class Expression(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"y": self.function(x)}


def op_of(function: Callable[[torch.Tensor], Any]) -> Op:
    """The last op of an expression of x [B, S, 6, 4]."""
    graph = op_graph_of(Expression(function), x=("B", "S", 6, 4))
    return list(graph)[-1]


@pytest.mark.parametrize(
    "function, kind, attrs",
    [
        (lambda x: x.softmax(-1), "softmax", {"dims": (-1,), "linear": False}),
        (lambda x: F.softmax(x, dim=2), "softmax", {"dims": (2,), "linear": False}),
        (lambda x: x.cumsum(dim=1), "cumsum", {"dims": (1,), "linear": True}),
        (lambda x: x.flip(2, 3), "flip", {"dims": (2, 3), "linear": True}),
        (lambda x: x.flip((2,)), "flip", {"dims": (2,), "linear": True}),
        (lambda x: torch.roll(x, shifts=(1, -2), dims=(1, 2)), "roll", {"dims": (1, 2), "linear": True}),
        (lambda x: x.roll(1, 2), "roll", {"dims": (2,), "linear": True}),
        (lambda x: x.roll(1), "opaque.roll", {}),
        (lambda x: torch.addcmul(x, x, x, value=2), "addcmul", {}),
        (lambda x: x.mean((2, 3)), "reduce", {"op": "mean", "dims": (2, 3), "keepdim": False}),
        (lambda x: x.sum(-1, keepdim=True), "reduce", {"op": "sum", "dims": (-1,), "keepdim": True}),
        (lambda x: x.sum(), "reduce", {"op": "sum", "dims": (0, 1, 2, 3), "keepdim": False}),
        (lambda x: x.norm(2, dim=-1), "reduce", {"op": "norm", "dims": (-1,), "keepdim": False}),
        (lambda x: x.norm(p=2, dim=2, keepdim=True), "reduce", {"op": "norm", "dims": (2,), "keepdim": True}),
        (lambda x: x.norm(), "reduce", {"op": "norm", "dims": (0, 1, 2, 3), "keepdim": False}),
        (lambda x: x.norm(2, 3), "reduce", {"op": "norm", "dims": (3,), "keepdim": False}),
        (lambda x: x.var(-1, keepdim=True), "reduce", {"op": "var", "dims": (-1,), "keepdim": True}),
        (lambda x: x.var(False), "reduce", {"op": "var", "dims": (0, 1, 2, 3), "keepdim": False}),
        (lambda x: x.transpose(-1, 1), "permute", {"order": (0, 3, 2, 1)}),
        (lambda x: x.permute(0, 2, -1, 1), "permute", {"order": (0, 2, 3, 1)}),
        (lambda x: x.permute((3, 2, 1, 0)), "permute", {"order": (3, 2, 1, 0)}),
        (lambda x: x.unsqueeze(-1), "permute", {"order": (0, 1, 2, 3, -1)}),
        (lambda x: x[:, :, :1].squeeze(2), "permute", {"order": (0, 1, 3)}),
        (lambda x: x[..., 1:3], "slice", {"dims": ((0, 0, 0, 1), (1, 1, 0, 1), (2, 2, 0, 1), (3, 3, 1, 1))}),
        (lambda x: x[:, None, :, -2:], "slice", {"dims": ((0, 0, 0, 1), (1, 2, 0, 1), (2, 3, 4, 1), (3, 4, 0, 1))}),
        (lambda x: x[:, :, 2, ::2], "slice", {"dims": ((0, 0, 0, 1), (1, 1, 0, 1), (3, 2, 0, 2)), "picks": ((2, 2),)}),
        (lambda x: x.chunk(2, -1)[0], "split", {"dim": 3}),
        (lambda x: torch.split(x, [1, 5], dim=2)[1], "split", {"dim": 2}),
        (lambda x: x.unbind(2)[0], "unbind", {"dim": 2}),
        (lambda x: torch.cat([x, x], -1), "cat", {"dim": 3}),
        (lambda x: torch.stack([x, x], dim=-1), "stack", {"dim": 4}),
        (lambda x: x.repeat_interleave(3, dim=-2), "repeat_interleave", {"repeats": 3, "dim": 2}),
        (lambda x: x.reshape(-1, 24), "view", {}),
        (lambda x: x[:, :, :, :1].expand(-1, -1, -1, 7), "expand", {}),
        (lambda x: torch.matmul(x, x.transpose(2, 3)), "matmul", {}),
        (lambda x: F.layer_norm(x, (6, 4)), "layer_norm", {"normalized": 2}),
        (lambda x: F.logsigmoid(x), "log_sigmoid", {}),
        (lambda x: x * 2, "scale", {}),
        (lambda x: x / 2, "scale", {}),
        (lambda x: 2 / x, "div", {}),
        (lambda x: x / x.shape[1], "scale", {}),
        (lambda x: x.shape[1] / x, "div", {}),
        (lambda x: torch.div(x, 2, rounding_mode="floor"), "div", {}),
        (lambda x: x * x, "mul", {}),
        (lambda x: 1 - x, "sub", {}),
        (lambda x: x[x.new_zeros(3, dtype=torch.long)], "index", {"dims": ((1, 1), (2, 2), (3, 3))}),
        (lambda x: torch.div(x, x + 1, rounding_mode="trunc"), "floordiv", {}),
        (lambda x: F.dropout(x, 0.1), "dropout", {"p": 0.1, "drawn": 4}),
        (lambda x: torch.rand_like(x), "opaque.seeded_uniform", {}),
        (lambda x: torch.einsum("bshd,bthd->bsht", x, x), "opaque.einsum", {}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_kinds_and_attributes(function: Callable[[torch.Tensor], Any], kind: str, attrs: dict[str, Any]) -> None:
    found = op_of(function)
    assert (found.kind, dict(found.attrs)) == (kind, attrs)
    assert kind.startswith("opaque.") or kind in RULES


def test_a_table_that_is_looked_up_the_other_way_round() -> None:
    """torch.embedding takes the table first, F.embedding last."""

    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(9, 6))

        def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": torch.embedding(self.table, ids)}

    whole = normalized(Lookup(), ids=Ids("B", "S"))
    assert_split_equals_whole(whole, plan_for(whole, tp=2), {"ids": torch.randint(0, 9, (2, 5))})


def test_roll_is_sharded_along_its_other_dims() -> None:
    """Windows that shift over an image (Swin): its channels stay where they are."""

    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": self.down(torch.roll(self.up(x), shifts=(2, -1), dims=(0, 1)))}

    whole = normalized(Shift(), x=("B", "S", 8))
    plan = plan_for(whole, tp=2)
    assert plan.op("roll").factor == "d2" and plan.stages[0].collectives == (("all_reduce", 1, 128 * 8 * 8),)
    assert_split_equals_whole(whole, plan, {"x": torch.randn(3, 5, 8, dtype=torch.float64)})


def test_a_number_by_a_sum_is_not_a_sum() -> None:
    """S / (a + b) is not S / a + S / b, so what a row-parallel linear owes is added up first."""

    class Inverse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": (x.shape[1] / (self.down(self.up(x)))).sum(-1)}

    whole = normalized(Inverse(), x=("B", "S", 8))
    plan = plan_for(whole, tp=2)
    assert plan.op("down").role == "row"
    assert_split_equals_whole(whole, plan, {"x": torch.randn(3, 5, 8, dtype=torch.float64)})


def test_parameters_are_ops_with_one_name_and_know_whether_they_are_matmuls() -> None:
    graph = op_graph_of(Stack([Mlp()], 8, vocab=9, tied=True), x=Ids("B", "S"))
    params = {op.name: bool(op.attrs.get("matmul")) for op in graph if op.kind == "param"}
    assert params == {
        "embed.weight": True, "layers.0.up.weight": True, "layers.0.up.bias": False, "layers.0.down.weight": True,
        "layers.0.down.bias": False,
    }  # fmt: skip
    assert graph["head"].inputs[1] == TensorRef("embed.weight")
    assert [user for user, _ in graph.users[TensorRef("embed.weight")]] == ["embed", "head"]
    assert graph["layers_0_up"].outputs[0].symbols == ("B", "S", "")


def test_the_fingerprint_tells_graphs_apart_and_nothing_else() -> None:
    def of(module: nn.Module, width: int = 12) -> str:
        return fingerprint(build_op_graph(normalized(module, x=("B", "S", width))))

    assert of(Attention(12, 4, 2)) == of(Attention(12, 4, 2))
    assert of(Mlp(12)) == of(Mlp(12))
    prints = [of(Attention(12, 4, 2)), of(Attention(12, 4, 4)), of(Mlp(12)), of(Mlp(12, 13)), of(Mlp(12, bias=False))]
    prints += [of(Mlp(8), 8), of(Expression(lambda x: x.softmax(-1))), of(Expression(lambda x: x.softmax(1)))]
    assert len(set(prints)) == len(prints)
