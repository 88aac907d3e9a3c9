"""The op of a layer of routed experts: row by row what its formula says, in parts that add up."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from passes.ops.experts import ACTIVATIONS, experts

ROWS, CHOSEN, COUNT, HIDDEN, INNER = 7, 2, 5, 6, 4
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def operands(gated: bool) -> Operands:
    """Expert 3 gets no row; row 4 has a choice that is no expert."""
    g = torch.Generator().manual_seed(0)
    x, up, down = (
        torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True)
        for shape in ((ROWS, HIDDEN), (COUNT, INNER * (1 + gated), HIDDEN), (COUNT, HIDDEN, INNER))
    )
    index = torch.tensor([[0, 1], [1, 2], [4, 0], [2, 1], [5, 4], [0, 2], [4, 1]])
    weights = torch.rand(ROWS, CHOSEN, generator=g, dtype=torch.float64).requires_grad_()
    return x, index, weights, up, down


def row_by_row(made: Operands, activation: str, gated: bool) -> torch.Tensor:
    x, index, weights, up, down = made
    rows = []
    for n in range(ROWS):
        total = torch.zeros(HIDDEN, dtype=torch.float64)
        for k in range(CHOSEN):
            e = int(index[n, k])
            if e < COUNT:
                inside = up[e] @ x[n]
                inside = ACTIVATIONS[activation](inside[:INNER]) * (inside[INNER:] if gated else 1)
                total = total + weights[n, k] * (down[e] @ inside)
        rows.append(total)
    return torch.stack(rows)


def gradients(y: torch.Tensor, made: Operands) -> list[torch.Tensor]:
    wanted = [t for t in made if t.requires_grad]
    return list(torch.autograd.grad((y * torch.arange(1.0, y.numel() + 1).view_as(y)).sum(), wanted))


@pytest.mark.parametrize(("activation", "gated"), [("silu", True), ("gelu", True), ("relu2", False)])
def test_it_is_its_formula_and_so_are_its_gradients(activation: str, gated: bool) -> None:
    made = operands(gated)
    y, expected = experts(*made, activation, gated, COUNT), row_by_row(made, activation, gated)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(gradients(y, made), gradients(expected, made), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_experts_in_any_order_and_parts_of_all_add_up() -> None:
    x, index, weights, up, down = operands(True)
    whole = experts(x, index, weights, up, down, "silu", True, COUNT)
    runs = (((1, 2), (3, 5)), ((0, 1),), ((2, 3),), ())
    dealt = [torch.tensor([e for a, b in run for e in range(a, b)], dtype=torch.long) for run in runs]
    parts = [
        experts(x, index, weights, up[own], down[own], "silu", True, COUNT, run)
        for run, own in zip(runs, dealt, strict=True)
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-12)
    inside = [experts(x, index, weights, up[:, [i, i + INNER]], down[:, :, [i]], "silu", True, COUNT) for i in range(4)]
    torch.testing.assert_close(sum(inside), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("run", [((3, 4),), ()], ids=["an idle one", "none"])
def test_a_rank_without_rows_has_gradients_of_zero(run: tuple[tuple[int, int], ...]) -> None:
    x, index, weights, up, down = operands(True)
    own = [e for a, b in run for e in range(a, b)]
    made = (x, index, weights, up[own].detach().requires_grad_(), down[own].detach().requires_grad_())
    y = experts(*made, "silu", True, COUNT, run)
    assert not y.any() and not any(g.any() for g in gradients(y, made))


def test_half_precision_is_rounded_as_the_loop_rounds_it() -> None:
    """Products in bfloat16, their weights in float32, sums in bfloat16, expert by expert."""
    x, index, weights, up, down = operands(True)
    x, up, down, weights = x.bfloat16(), up.bfloat16(), down.bfloat16(), weights.float()
    expected = torch.zeros_like(x)
    for e in range(COUNT):
        rows, choice = torch.where(index == e)
        gate, inside = F.linear(x[rows], up[e]).chunk(2, dim=-1)
        made = F.linear(F.silu(gate) * inside, down[e]) * weights[rows, choice, None]
        expected = expected.index_add(0, rows, made.to(torch.bfloat16))
    found = experts(x, index, weights, up, down, "silu", True, COUNT)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_on_meta_it_has_a_shape() -> None:
    on_meta = [t.detach().to("meta") for t in operands(True)]
    assert experts(*on_meta, "silu", True, COUNT).shape == (ROWS, HIDDEN)  # type: ignore[arg-type]
