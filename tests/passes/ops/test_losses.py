"""cross_entropy_part against torch's cross_entropy: terms add up, and their gradients are parts of the whole one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from passes.ops.losses import cross_entropy_part

ROWS, CLASSES = 7, 11
CUTS = {
    "even and odd": [[(0, 6)], [(6, 11)]],
    "a rank without classes": [[(0, 4)], [], [(4, 11)]],
    "several runs": [[(0, 3), (7, 9)], [(3, 7), (9, 11)]],
}
Cut = list[list[tuple[int, int]]]


def drawn(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [n, classes, 2], far apart, one row's largest above what exp takes in float32; every third is ignored."""
    generator = torch.Generator().manual_seed(0)
    scores = 5 * torch.randn(ROWS, CLASSES, 2, generator=generator, dtype=torch.float64)
    scores[0] += 800
    target = torch.randint(0, CLASSES, (ROWS, 2), generator=generator)
    target.view(-1)[::3] = 4  # which is a class, too
    return scores.to(dtype), target


def terms(scores: torch.Tensor, target: torch.Tensor, cut: Cut, **settings: Any) -> list[torch.Tensor]:
    log_sums = scores.detach().double().logsumexp(1)
    if scores.dtype != torch.float64:
        log_sums = log_sums.float()
    parts = [torch.cat([scores[:, a:b] for a, b in runs] or [scores[:, :0]], 1) for runs in cut]
    return [
        cross_entropy_part(part, target, log_sums, (CLASSES, runs), **settings)
        for part, runs in zip(parts, cut, strict=True)
    ]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_terms_and_gradients(cut: Cut, reduction: str, smoothing: float) -> None:
    settings = {"reduction": reduction, "ignore_index": 4, "label_smoothing": smoothing}
    scores, target = drawn()
    whole, own = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    wanted, found = F.cross_entropy(whole, target, **settings), sum(terms(own, target, cut, **settings))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.arange(1.0, wanted.numel() + 1, dtype=torch.float64).view_as(wanted)
    (wanted * weights).sum().backward()
    (found * weights).sum().backward()
    torch.testing.assert_close(own.grad, whole.grad, rtol=1e-12, atol=1e-12)


def test_a_row_whose_target_has_almost_all_of_the_probability_keeps_its_digits() -> None:
    """Its loss is far smaller than the scores that it is the difference of."""
    scores, target = torch.zeros(1, CLASSES), torch.tensor([2])
    scores[0, 2] = 12.0
    found = sum(terms(scores, target, CUTS["even and odd"], reduction="sum"))
    wanted = F.cross_entropy(scores.double(), target, reduction="sum")
    torch.testing.assert_close(found.double(), wanted, rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_16_bits_are_computed_with_in_float32(dtype: torch.dtype) -> None:
    scores, target = drawn(dtype)
    own = scores.clone().requires_grad_()
    found = sum(terms(own, target, CUTS["several runs"], reduction="sum"))
    assert found.dtype == dtype
    found.backward()
    whole = scores.double().requires_grad_()
    wanted = F.cross_entropy(whole, target, reduction="sum")
    wanted.backward()
    torch.testing.assert_close(found.double(), wanted, rtol=0.01, atol=0)
    torch.testing.assert_close(own.grad.double(), whole.grad, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("outside", [-1, CLASSES])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_target_that_is_no_class_is_refused_by_every_rank_alike(cut: Cut, outside: int) -> None:
    scores, target = drawn()
    target[3, 1] = outside
    for runs in cut:
        part = torch.cat([scores[:, a:b] for a, b in runs] or [scores[:, :0]], 1)
        with pytest.raises(IndexError, match=rf"^a target is {outside}, and there are classes 0 to 10$"):
            cross_entropy_part(part, target, scores.logsumexp(1), (CLASSES, runs))
