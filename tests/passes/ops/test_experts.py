"""The op of a layer of routed experts: row by row what its formula says, in parts that add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from passes.ops.experts import Gate, experts, gate_function, is_gate

ROWS, CHOSEN, COUNT, HIDDEN, INNER = 7, 2, 5, 6, 4
Operands = tuple[torch.Tensor | None, ...]
SILU: Gate = (("silu", "gate"), ("mul", "%0", "up"))
CLAMPED: Gate = (
    ("clamp", "up", -0.7, 0.7), ("add", "%0", 1), ("clamp", "gate", None, 0.7), ("mul", "%2", 1.702), ("sigmoid", "%3"),
    ("mul", "%2", "%4"), ("mul", "%1", "%5"),
)  # fmt: skip


def clamped(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate = gate.clamp(max=0.7)
    return (up.clamp(-0.7, 0.7) + 1) * (gate * torch.sigmoid(1.702 * gate))


# The gate and how it lies; transposed and with biases; what it computes of (gate, up), or of up.
WAYS: dict[str, tuple[tuple[Any, ...], bool, Any]] = {
    "silu": ((SILU, "halves", False), False, lambda gate, up: F.silu(gate) * up),
    "pairs": ((SILU, "pairs", False), False, lambda gate, up: F.silu(gate) * up),
    "clamped": ((CLAMPED, "pairs", True), True, clamped),
    "relu2": (((("relu", "up"), ("square", "%0")), "one", True), False, lambda up: up.relu() ** 2),
    "plain": (((), "one", False), True, lambda up: up),
}


def operands(way: str = "silu") -> Operands:
    """x, index, weights, up, down and biases. Expert 3 gets no row; row 4 has a choice that is no expert."""
    (_, parts, transposed), biased, _ = WAYS[way]
    g = torch.Generator().manual_seed(0)
    width = INNER * (1 if parts == "one" else 2)
    shapes = [(ROWS, HIDDEN), (COUNT, width, HIDDEN), (COUNT, HIDDEN, INNER)]
    shapes[1:] = [(e, i, o) if transposed else (e, o, i) for e, o, i in shapes[1:]]
    shapes += [(COUNT, width), (COUNT, HIDDEN)] if biased else []
    x, up, down, *biases = (
        torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in shapes
    )
    index = torch.tensor([[0, 1], [1, 2], [4, 0], [2, 1], [5, 4], [0, 2], [4, 1]])
    weights = torch.rand(ROWS, CHOSEN, generator=g, dtype=torch.float64).requires_grad_()
    return x, index, weights, up, down, *(biases or (None, None))


def row_by_row(made: Operands, way: str) -> torch.Tensor:
    x, index, weights, up, down, up_bias, down_bias = made
    (_, parts, transposed), _, inside_of = WAYS[way]
    rows = []
    for n in range(ROWS):
        total = torch.zeros(HIDDEN, dtype=torch.float64)
        for k in range(CHOSEN):
            e = int(index[n, k])
            if e < COUNT:
                first, second = (w[e].t() if transposed else w[e] for w in (up, down))
                inside = first @ x[n] + (0 if up_bias is None else up_bias[e])
                pieces = {"one": (inside,), "halves": inside.split(INNER), "pairs": (inside[::2], inside[1::2])}[parts]
                total = total + weights[n, k] * (
                    second @ inside_of(*pieces) + (0 if down_bias is None else down_bias[e])
                )
        rows.append(total)
    return torch.stack(rows)


def gradients(y: torch.Tensor, made: Operands) -> list[torch.Tensor]:
    wanted = [t for t in made if t is not None and t.requires_grad]
    return list(torch.autograd.grad((y * torch.arange(1.0, y.numel() + 1).view_as(y)).sum(), wanted))


@pytest.mark.parametrize("way", WAYS)
def test_it_is_its_formula_and_so_are_its_gradients(way: str) -> None:
    made = operands(way)
    y, expected = experts(*made, *WAYS[way][0], COUNT), row_by_row(made, way)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(gradients(y, made), gradients(expected, made), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(experts(*made, *WAYS[way][0], COUNT), y, rtol=0, atol=0)


@pytest.mark.parametrize("way", ["silu", "clamped"])
def test_experts_in_any_order_and_parts_of_all_add_up(way: str) -> None:
    (gate, parts, transposed), made = WAYS[way][0], operands(way)
    x, index, weights, up, down, up_bias, down_bias = made
    whole = experts(*made, gate, parts, transposed, COUNT)
    runs = (((1, 2), (3, 5)), ((0, 1),), ((2, 3),), ())
    total = torch.zeros_like(whole)
    for run in runs:
        own = torch.tensor([e for a, b in run for e in range(a, b)], dtype=torch.long)
        held = [None if t is None else t[own] for t in (up, down, up_bias, down_bias)]
        total = total + experts(x, index, weights, *held, gate, parts, transposed, COUNT, run)
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)
    total = torch.zeros_like(whole)
    for i in range(INNER):  # one rank alone adds down's bias
        both = [2 * i, 2 * i + 1] if parts == "pairs" else [i, i + INNER]
        cut = (up[:, :, both], down[:, [i]]) if transposed else (up[:, both], down[:, :, [i]])
        biases = (None if up_bias is None else up_bias[:, both], down_bias if i == 0 else None)
        total = total + experts(x, index, weights, *cut, *biases, gate, parts, transposed, COUNT)
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("run", [((3, 4),), ()], ids=["an idle one", "none"])
def test_a_rank_without_rows_has_gradients_of_zero(run: tuple[tuple[int, int], ...]) -> None:
    x, index, weights, *stacks = operands("clamped")
    own = [e for a, b in run for e in range(a, b)]
    made = (x, index, weights, *(t[own].detach().requires_grad_() for t in stacks))
    y = experts(*made, *WAYS["clamped"][0], COUNT, run)
    assert not y.any() and not any(g.any() for g in gradients(y, made))


def test_half_precision_is_rounded_as_the_loop_rounds_it() -> None:
    """Products in bfloat16, their weights in float32, sums in bfloat16, expert by expert."""
    x, index, weights, up, down, *_ = operands()
    x, up, down, weights = x.bfloat16(), up.bfloat16(), down.bfloat16(), weights.float()
    expected = torch.zeros_like(x)
    for e in range(COUNT):
        rows, choice = torch.where(index == e)
        gate, inside = F.linear(x[rows], up[e]).chunk(2, dim=-1)
        made = F.linear(F.silu(gate) * inside, down[e]) * weights[rows, choice, None]
        expected = expected.index_add(0, rows, made.to(torch.bfloat16))
    found = experts(x, index, weights, up, down, None, None, SILU, "halves", False, COUNT)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_on_meta_it_has_a_shape() -> None:
    on_meta = [None if t is None else t.detach().to("meta") for t in operands()]
    assert experts(*on_meta, SILU, "halves", False, COUNT).shape == (ROWS, HIDDEN)


@pytest.mark.parametrize(
    ("gate", "parts"),
    [
        ((("system", "up"),), "one"), ((("silu", "gate"),), "one"), ((("silu", "%0"),), "halves"),
        ((("mul", "gate"),), "halves"), ((("add", 1, 2),), "halves"), ([("silu", "gate")], "halves"),
        ((["silu", "gate"],), "halves"), (SILU, "thirds"), ((("add", "up", "other"),), "one"),
        ((("pow", "up", (2,)),), "one"), ("silu", "halves"),
    ],
)  # fmt: skip
def test_what_is_no_gate(gate: Any, parts: str) -> None:
    assert not is_gate(gate, parts) and is_gate(SILU, "halves") and is_gate((), "one")


def test_a_gate_is_a_function_of_gate_and_up() -> None:
    gate, up = torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.equal(gate_function((("gelu", "gate", "tanh"), ("mul", "%0", "up")))(gate, up),
                       F.gelu(gate, approximate="tanh") * up)  # fmt: skip
