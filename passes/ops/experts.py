"""A layer of routed experts as one op: each row goes through the experts that a router chose for it.

    y[n] = sum over k of weights[n, k] * (down[e] @ inside(up[e] @ x[n] + up_bias[e]) + down_bias[e]),   e = index[n, k]

A rank may hold some experts whole (`held`), or a part of the inside of each: both give a term of the sum.

The inside is a chain of elementwise steps, told as data (a *gate*): graphs print, compare and are saved with it.

    (("silu", "gate"), ("mul", "%0", "up"))                       silu(gate) * up
    (("clamp", "up", -7.0, 7.0), ("add", "%0", 1), ...)           "%0": what step 0 made
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch.nn import functional as F

Gate = tuple[tuple[Any, ...], ...]  # steps (name in GATE_OPS, operand, ...); the last one's result is the gate's
Parts = Literal["one", "halves", "pairs"]  # of what `up` makes: up alone; gate before up; gate and up by turns
PARTS: tuple[Parts, ...] = ("one", "halves", "pairs")
GIVEN = ("gate", "up")  # operands that are there before the first step

# Elementwise, so that a rank may do them on its part of the inside. Arguments have torch's names and defaults.
GATE_OPS: dict[str, Callable[..., torch.Tensor]] = {
    "abs": lambda input: torch.abs(input),
    "add": lambda input, other: input + other,
    "clamp": lambda input, min=None, max=None: torch.clamp(input, min, max),
    "div": lambda input, other: input / other,
    "erf": lambda input: torch.erf(input),
    "exp": lambda input: torch.exp(input),
    "gelu": lambda input, approximate="none": F.gelu(input, approximate=approximate),
    "leaky_relu": lambda input, negative_slope=0.01: F.leaky_relu(input, negative_slope),
    "mish": lambda input: F.mish(input),
    "mul": lambda input, other: input * other,
    "neg": lambda input: -input,
    "pow": lambda input, exponent: torch.pow(input, exponent),
    "relu": lambda input: F.relu(input),
    "relu6": lambda input: F.relu6(input),
    "sigmoid": lambda input: torch.sigmoid(input),
    "silu": lambda input: F.silu(input),
    "softplus": lambda input, beta=1.0, threshold=20.0: F.softplus(input, beta, threshold),
    "sqrt": lambda input: torch.sqrt(input),
    "square": lambda input: torch.square(input),
    "sub": lambda input, other: input - other,
    "tanh": lambda input: torch.tanh(input),
}


def experts(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate: Gate,
    parts: Parts,
    transposed: bool,
    count: int,
    held: Sequence[tuple[int, int]] | None = None,
) -> torch.Tensor:
    """Returns the weighted sum of what the chosen experts make of each row: [rows, hidden], of the dtype of `x`.

    x [rows, hidden]; index [rows, k], integers, the chosen experts: what is no number below `count` is none; weights
    [rows, k]; up [experts, 2 * inner, hidden], whose products lie as `parts` says, or [experts, inner, hidden] for
    "one"; down [experts, hidden, inner]; the last two dims of both the other way round if `transposed`; up_bias
    [experts, 2 * inner or inner] and down_bias [experts, hidden], or None. `held`: the experts [start, stop) that the
    weights have, one after the other; None for all `count`.

    Rows are sorted by expert, and each expert makes one product of all of its rows: one without rows costs nothing.
    """
    out = x.new_zeros(x.shape)
    if x.device.type == "meta":
        return out
    runs = ((0, count),) if held is None else tuple(held)
    chosen = index.reshape(-1)
    order = chosen.argsort(stable=True)
    numbers = torch.arange(count + 1, dtype=chosen.dtype, device=chosen.device)
    ends = torch.searchsorted(chosen[order], numbers).tolist()
    pairs = torch.cat([order[ends[start] : ends[stop]] for start, stop in (*runs, (0, 0))])
    rows, scale = pairs // index.shape[1], weights.reshape(-1, 1)[pairs]
    given, made, at = x[rows], [], 0
    tensors = [t for t in (up, down, up_bias, down_bias) if t is not None]
    first, second = _layer(up, up_bias, transposed), _layer(down, down_bias, transposed)
    for place, expert in enumerate(e for start, stop in runs for e in range(start, stop)):
        size = ends[expert + 1] - ends[expert]
        if size:
            made.append(second(place, _inside(first(place, given[at : at + size]), gate, parts)))
            at += size
    if made:
        return out.index_add_(0, rows, (torch.cat(made) * scale).to(out.dtype))
    # Nothing to do; backward, the rank takes part in the others' sums nevertheless.
    return out + (given.sum() + scale.sum() + sum(t[:0].sum() for t in tensors)).to(out.dtype)


def _layer(
    weights: torch.Tensor, biases: torch.Tensor | None, transposed: bool
) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """Returns the function of (place of an expert, rows) that is the expert's product."""
    own, bias = _each(weights), None if biases is None else _each(biases)

    def product(place: int, rows: torch.Tensor) -> torch.Tensor:
        made = rows @ own[place] if transposed else F.linear(rows, own[place])
        return made if bias is None else made + bias[place]

    return product


def _each(stack: torch.Tensor) -> Sequence[torch.Tensor]:
    """Returns the tensors of a stack. Of one that gets a gradient all at once: each choice's would be as large as the
    stack."""
    return stack.unbind(0) if torch.is_grad_enabled() and stack.requires_grad else stack


# -- the gate ----------------------------------------------------------------------------------------------------------


def _inside(made: torch.Tensor, gate: Gate, parts: Parts) -> torch.Tensor:
    """Returns what the gate makes of [rows, 2 * inner], or of [rows, inner] for "one": [rows, inner]."""
    run = gate_function(gate)
    if parts == "one":
        return run(made, made)
    if parts == "pairs":
        return run(made[:, ::2], made[:, 1::2])
    half = made.shape[1] // 2
    return run(made[:, :half], made[:, half:])


@functools.cache
def gate_function(gate: Gate) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Returns the function of (gate, up), of equal shapes, that the steps describe; `up` itself for no steps."""
    steps = [(f"%{number}", GATE_OPS[name], operands) for number, (name, *operands) in enumerate(gate)]

    def run(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        values, found = {"gate": gate, "up": up}, up
        for name, function, operands in steps:
            found = function(*(values.get(a, a) if isinstance(a, str) else a for a in operands))
            values[name] = found
        return found

    return run


def is_gate(gate: Any, parts: Any) -> bool:
    """Returns whether `gate` and `parts` are a gate's: steps of GATE_OPS, over what is there before them."""
    if not isinstance(gate, tuple) or parts not in PARTS:
        return False
    known = {"up"} if parts == "one" else set(GIVEN)
    for number, step in enumerate(gate):
        if not isinstance(step, tuple) or not step or not isinstance(step[0], str) or step[0] not in GATE_OPS:
            return False
        operands = step[1:]
        if not all(a is None or a in known or a in ("none", "tanh") or _is_number(a) for a in operands):
            return False
        try:
            inspect.signature(GATE_OPS[step[0]]).bind(*operands)
        except TypeError:
            return False
        if not any(isinstance(a, str) and a in known for a in operands):
            return False
        known.add(f"%{number}")
    return True


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not math.isnan(value)
