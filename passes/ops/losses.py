"""A rank's part of a loss over classes (a vocabulary), of which each rank has some.

    loss of a row = sum over classes of q * (log_sum - score), where log_sum = log(sum(exp(scores)))

q is the target's distribution, and log_sum of all classes: `comm.log_sum_exp` gives it. The rest is a sum over a rank's
own classes, which is owed over the ranks; each row's loss is on the rank that has its target, so that nothing large
cancels between them. The gradient of a score, exp(score - log_sum) - q, needs no other rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import Function

Cut = tuple[int, Sequence[tuple[int, int]]]  # number of all classes, and the runs [start, stop) of them that a rank has


def cross_entropy_part(
    scores: torch.Tensor,
    target: torch.Tensor,
    log_sums: torch.Tensor,
    cut: Cut,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Returns this rank's term of torch's cross_entropy(scores, target, ...): losses [n, ...], or their sum or mean [].

    scores [n, own classes, ...], as they lie in `cut`; target [n, ...], numbers among all classes; log_sums [n, ...],
    of all classes, without a gradient. Scores of 16 bits are computed with in float32. Raises IndexError, on every rank
    alike, for a target that is no class and not ignored (on CUDA, where looking at it would wait for it, gather's own).
    """
    classes, runs = cut
    counted = target != ignore_index
    nobodys = counted & ((target < 0) | (target >= classes))
    if target.device.type == "cpu" and bool(nobodys.any()):
        raise IndexError(f"a target is {int(target[nobodys][0])}, and there are classes 0 to {classes - 1}")
    place, own = _places(target, runs, nobodys)
    terms = _Terms.apply(scores, place, own & counted, counted, log_sums, label_smoothing, classes)
    if reduction != "none":
        terms = terms.sum() if reduction == "sum" else terms.sum() / counted.sum()
    return terms.to(scores.dtype)


def widened(x: torch.Tensor) -> torch.Tensor:
    """Returns `x`, in float32 where it has 16 bits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _places(
    target: torch.Tensor, runs: Sequence[tuple[int, int]], nobodys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns where the targets lie among a rank's classes, and whether they do: 0 for those of other ranks, and beyond
    the end, which a gather refuses, for those of none."""
    count, before = sum(stop - start for start, stop in runs), 0
    place, own = count * nobodys.to(target.dtype), torch.zeros_like(nobodys)
    for start, stop in runs:
        inside = (target >= start) & (target < stop)
        place = torch.where(inside, target - start + before, place)
        own = own | inside
        before += stop - start
    return place, own


class _Terms(Function):
    """The terms [n, ...] of all rows; their gradient is computed in place of the scores' exps, which are made again."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: torch.Tensor,
        place: torch.Tensor,
        own: torch.Tensor,
        counted: torch.Tensor,
        log_sums: torch.Tensor,
        smoothing: float,
        classes: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(scores, place, own, counted, log_sums)
        ctx.smoothing, ctx.classes = smoothing, classes
        wide = widened(scores)
        zero = log_sums.new_zeros(())
        terms = torch.where(own, log_sums - _picked(wide, place), zero)
        if smoothing:
            spread = wide.shape[1] * log_sums - wide.sum(1)
            terms = (1 - smoothing) * terms + torch.where(counted, smoothing / classes * spread, zero)
        return terms

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        scores, place, own, counted, log_sums = ctx.saved_tensors
        wide, smoothing = widened(scores), ctx.smoothing
        row = torch.where(counted, gradients[0], gradients[0].new_zeros(())).unsqueeze(1)
        found = (wide - log_sums.unsqueeze(1)).exp_().mul_(row)
        if smoothing:
            found -= smoothing / ctx.classes * row
        if wide.shape[1]:
            found.scatter_add_(1, place.unsqueeze(1), torch.where(own.unsqueeze(1), (smoothing - 1) * row, 0))
        return found.to(scores.dtype), None, None, None, None, None, None


def _picked(scores: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Returns scores [n, ...] at `place`; anything where there are no classes."""
    if not scores.shape[1]:
        return scores.new_zeros(place.shape)
    return scores.gather(1, place.unsqueeze(1)).squeeze(1)
