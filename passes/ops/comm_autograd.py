"""Backward passes of what the ranks of a tp group say to each other, as Megatron-LM's f and g (Shoeybi et al. 2019,
https://arxiv.org/abs/1909.08053, figure 3).

    all_reduce     backward nothing is said: the gradient of a sum is that of each of its terms (g)
    all_gather     backward each rank takes what belongs to its own part
    copy_to_tp     forward nothing is done; backward all_reduce: each rank has a term of the gradient (f)
    one_term       forward rank 0 has it, the others zeros; backward nothing is done
    one_gradient   forward nothing is done; backward rank 0 has it, the others zeros

A send and a recv belong to a stage's whole graph, and so does their backward
(autodist_fx/runtime/training/backward.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.autograd import Function

Parts = Sequence[Sequence[tuple[int, int]]]


class Group(Protocol):
    """The collectives of a Communicator that backward passes use."""

    tp_rank: int

    def all_reduce(self, x: torch.Tensor, axis: str) -> torch.Tensor: ...

    def all_gather(self, x: torch.Tensor, axis: str, dim: int, parts: Parts) -> torch.Tensor: ...


class AllReduce(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: str, group: Group) -> torch.Tensor:
        return group.all_reduce(x.clone(), axis)  # a clone: x may be reused, and others may have kept it for backward

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], None, None


class AllGather(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: str, dim: int, parts: Parts, group: Group) -> torch.Tensor:
        ctx.dim, ctx.parts, ctx.tp_rank = dim, parts, group.tp_rank
        return group.all_gather(x, axis, dim, parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return _first_owned(gradients[0], ctx.dim, ctx.parts, ctx.tp_rank), None, None, None, None


class CopyToTp(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: str, group: Group) -> torch.Tensor:
        ctx.axis, ctx.group = axis, group  # kept: backward may run in a thread that speaks through no communicator
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return ctx.group.all_reduce(gradients[0].clone(), ctx.axis), None, None


class OneTerm(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tp_rank: int) -> torch.Tensor:
        return x.view_as(x) if tp_rank == 0 else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], None


class OneGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tp_rank: int) -> torch.Tensor:
        ctx.tp_rank = tp_rank
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0] if ctx.tp_rank == 0 else torch.zeros_like(gradients[0]), None


def _first_owned(gradient: torch.Tensor, dim: int, parts: Parts, tp_rank: int) -> torch.Tensor:
    """Returns this rank's part of a whole tensor's gradient. What several ranks hold came from the first of them, so
    that its gradient is all there, and zero on the others."""
    own = parts[tp_rank]
    pieces = [gradient.narrow(dim, start, stop - start) for start, stop in own]
    part = torch.cat(pieces, dim) if pieces else gradient.narrow(dim, 0, 0)
    index = [i for start, stop in own for i in range(start, stop)]
    earlier = {i for rank in range(tp_rank) for start, stop in parts[rank] for i in range(start, stop)}
    if earlier.isdisjoint(index):
        return part
    shape = [1] * part.dim()
    shape[dim] = len(index)
    mine = torch.tensor([i not in earlier for i in index], dtype=torch.bool, device=part.device)
    return part.masked_fill(~mine.view(shape), 0)
