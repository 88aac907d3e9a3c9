"""divide_losses: the losses of the parts of a batch add up to the loss of all of it, and so do their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional as F

from cost_model.errors import PlanError
from passes.fx.node_meta import Phase
from passes.fx.run_passes import run_passes
from passes.fx.text import graph_text
from passes.losses.divide_losses import SHARE, LossContext, divide_losses
from passes.normalize.eliminate_dead_code import eliminate_dead_code
from tests.support.graphs.small import Ids, normalized

CLASSES = 5
Loss = Callable[..., torch.Tensor]


class Model(nn.Module):
    """x [B, S, 4], labels [B, S], mask [B, S] -> a loss of its scores."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.head = nn.Linear(4, CLASSES, bias=False, dtype=torch.float64)
        self.register_buffer("weight", torch.arange(1.0, CLASSES + 1, dtype=torch.float64))
        self.criterion = nn.CrossEntropyLoss(self.weight.flip(0), ignore_index=1)
        self.loss = loss

    def forward(self, x: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.head(x)
        return {"loss": self.loss(self, scores, labels, mask), "scores": scores}


def flat(scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return scores.reshape(-1, CLASSES), labels.reshape(-1)


class Balanced(Model):
    """A mean over labels, and a term that is no sum over rows."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.head(x)
        balance = scores.softmax(-1).mean((0, 1)).square().sum()
        return {"loss": F.cross_entropy(*flat(scores, labels)) + 0.1 * balance}


LOSSES: dict[str, Any] = {
    "cross entropy": lambda m, s, y, k: F.cross_entropy(*flat(s, y)),
    "smoothed": lambda m, s, y, k: F.cross_entropy(*flat(s, y), label_smoothing=0.1),
    "weighted classes": lambda m, s, y, k: F.cross_entropy(*flat(s, y), weight=m.weight),
    "nll": lambda m, s, y, k: F.nll_loss(s.log_softmax(-1).reshape(-1, CLASSES), y.reshape(-1), ignore_index=2),
    "squares": lambda m, s, y, k: F.mse_loss(s[..., 0], y.double()),
    "two means": lambda m, s, y, k: (F.cross_entropy(*flat(s, y)) + 3 * F.l1_loss(s[..., 1], y.double())) / 2,
    "plain mean": lambda m, s, y, k: s.square().mean() - 0.5 * s.mean(),
    "sum over mask": lambda m, s, y, k: (s[..., 0].square() * k).sum() / k.sum(),
    "sum": lambda m, s, y, k: F.cross_entropy(*flat(s, y), reduction="sum"),
    "a number more": lambda m, s, y, k: F.cross_entropy(*flat(s, y)) + 1,
    "module": lambda m, s, y, k: m.criterion(*flat(s, y)),
}  # fmt: skip


def divided(module: nn.Module) -> tuple[torch.fx.GraphModule, LossContext]:
    graph = normalized(module, x=("B", "S", 4), labels=Ids("B", "S"), mask=("B", "S"))
    ctx = LossContext(Phase.NORMALIZED)
    run_passes((divide_losses, eliminate_dead_code), graph, ctx)
    graph.recompile()
    return graph, ctx


def inputs() -> dict[str, torch.Tensor]:
    labels = torch.randint(0, CLASSES, (7, 6))
    labels[0, 2:] = -100
    return {"x": torch.randn(7, 6, 4).double(), "labels": labels, "mask": (torch.rand(7, 6) > 0.3).double()}


@torch.enable_grad()
def loss_of_parts(graph: torch.fx.GraphModule, ctx: LossContext, whole: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum over three parts of uneven numbers of rows."""
    parts = [{name: x[rows] for name, x in whole.items()} for rows in (slice(0, 1), slice(1, 3), slice(3, 7))]
    totals: dict[str, Any] = {SHARE: 1 / len(parts)}
    for part in parts if ctx.counts is not None else ():
        for name, count in ctx.counts(**part).items():
            totals[name] = totals.get(name, 0) + count
    more = {name: torch.tensor(float(totals[name]), dtype=dtype) for name, dtype in ctx.inputs.items()}
    return sum(graph(**part, **more)["loss"] for part in parts)


@pytest.mark.parametrize("name", LOSSES)
def test_parts_add_up(name: str) -> None:
    module, whole = Model(LOSSES[name]), inputs()
    if name in ("nll", "squares", "module"):
        whole["labels"] = whole["labels"].clamp(min=0)
    graph, ctx = divided(module)
    wanted = module(**whole)["loss"]
    (of_whole,) = torch.autograd.grad(wanted, [module.head.weight])
    found = loss_of_parts(graph, ctx, whole)
    (of_parts,) = torch.autograd.grad(found, [graph.head.weight])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(of_parts, of_whole, rtol=1e-9, atol=1e-12)


def test_what_is_no_sum_over_rows_counts_equally() -> None:
    module, whole = Balanced(lambda: None), inputs()
    found = loss_of_parts(*divided(module), whole)
    parts = [{name: x[rows] for name, x in whole.items()} for rows in (slice(0, 1), slice(1, 3), slice(3, 7))]
    balances = [0.1 * module.head(part["x"]).softmax(-1).mean((0, 1)).square().sum() for part in parts]
    wanted = F.cross_entropy(*flat(module.head(whole["x"]), whole["labels"])) + sum(balances) / 3
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_a_graph_before_and_after() -> None:
    graph, ctx = divided(Balanced(lambda: None))
    assert_expected_inline(graph_text(graph), """\
x : f64[B, S, 4] = input
labels : i64[B, S] = input
mask : f64[B, S] = input
loss_count_0 : f64[] = input
loss_share : f64[] = input
head : f64[B, S, 5] = head(x)  # Linear[5, 4]
softmax : f64[B, S, 5] = .softmax(head, -1)
mean : f64[5] = .mean(softmax, (0, 1))
square : f64[5] = .square(mean)
sum_1 : f64[] = .sum(square)
reshape : f64[B*S, 5] = reshape(head, (-1, 5))
reshape_1 : i64[B*S] = reshape(labels, (-1,))
cross_entropy_1 : f64[] = cross_entropy(reshape, reshape_1, reduction='sum', ignore_index=-100, label_smoothing=0.0)
truediv : f64[] = truediv(cross_entropy_1, loss_count_0)
mul_1 : f64[] = mul(sum_1, loss_share)
mul_2 : f64[] = mul(0.1, mul_1)
add_2 : f64[] = add(truediv, mul_2)
return {loss: add_2}""")
    assert ctx.counts is not None and set(ctx.inputs) == {"loss_count_0", "loss_share"}


def test_targets_that_the_model_computes_are_refused() -> None:
    def loss(m: nn.Module, s: torch.Tensor, y: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(s.reshape(-1, CLASSES), s.argmax(-1).reshape(-1))

    with pytest.raises(PlanError, match="a mean over targets that the model itself computes"):
        divided(Model(loss))
