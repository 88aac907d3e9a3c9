"""A layer of routed experts as one op: each row goes through the experts that a router chose for it.

    y[n] = sum over k of weights[n, k] * down[e] @ (act(gate[e] @ x[n]) * up[e] @ x[n]),    e = index[n, k]

A rank may hold some experts whole (`held`), or a part of the inside of each: both give a term of the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

# By the names that transformers gives them.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def experts(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
    gated: bool,
    count: int,
    held: Sequence[tuple[int, int]] | None = None,
) -> torch.Tensor:
    """Returns the weighted sum of what the chosen experts make of each row: [rows, hidden], of the dtype of `x`.

    x [rows, hidden]; index [rows, k], integers, the chosen experts: what is no number below `count` is none; weights
    [rows, k]; up [experts, 2 * inner, hidden], gate before up, or [experts, inner, hidden] if not `gated`; down
    [experts, hidden, inner]. `held`: the experts [start, stop) that `up` and `down` have, one after the other; None for
    all `count`.

    Rows are sorted by expert, and each expert makes one product of all of its rows: one without rows costs nothing.
    """
    out = x.new_zeros(len(x), down.shape[1])
    if x.device.type == "meta":
        return out
    runs = ((0, count),) if held is None else tuple(held)
    chosen = index.reshape(-1)
    order = chosen.argsort(stable=True)
    ends = torch.searchsorted(chosen[order], torch.arange(count + 1).to(chosen)).tolist()
    pairs = torch.cat([order[ends[start] : ends[stop]] for start, stop in (*runs, (0, 0))])
    rows, scale = pairs // index.shape[1], weights.reshape(-1, 1)[pairs]
    given, made, at = x[rows], [], 0
    ups, downs = up.unbind(0), down.unbind(0)  # once: the gradient of each choice would be as large as all experts
    for place, expert in enumerate(e for start, stop in runs for e in range(start, stop)):
        size = ends[expert + 1] - ends[expert]
        if size:
            inside = F.linear(given[at : at + size], ups[place])
            made.append(F.linear(_activated(inside, activation, gated), downs[place]))
            at += size
    if made:
        return out.index_add_(0, rows, (torch.cat(made) * scale).to(out.dtype))
    # Nothing to do; backward, the rank takes part in the others' sums nevertheless.
    return out + (given.sum() + scale.sum() + up[:0].sum() + down[:0].sum()).to(out.dtype)


def _activated(inside: torch.Tensor, activation: str, gated: bool) -> torch.Tensor:
    """Returns act(gate) * up of [rows, 2 * inner], or act(up) of [rows, inner] if not `gated`: [rows, inner]."""
    if not gated:
        return ACTIVATIONS[activation](inside)
    half = inside.shape[1] // 2
    return ACTIVATIONS[activation](inside[:, :half]) * inside[:, half:]
