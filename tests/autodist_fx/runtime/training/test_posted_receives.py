"""Receives that are posted ahead: taken in order, and the time that a rank waits for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from autodist_fx.errors import CommunicationError
from autodist_fx.runtime.training.posted_receives import PostedReceives

SECONDS = 0.05


class Slow:
    """A transport whose messages take their time, and say their number."""

    def __init__(self) -> None:
        self.posted = 0

    def start_recv(self, shape: Sequence[int], *_: Any) -> Callable[[], torch.Tensor]:
        self.posted += 1
        number = self.posted

        def wait() -> torch.Tensor:
            time.sleep(SECONDS)
            return torch.full(tuple(shape), float(number))

        return wait


def test_waiting_counts_and_posting_does_not() -> None:
    receives = PostedReceives(Slow())  # type: ignore[arg-type]
    for _ in range(3):
        receives.post((2,), torch.float32, "cpu", source=1, channel=0)
    time.sleep(SECONDS)  # the rank computes
    assert receives.waited_seconds < SECONDS
    assert [receives.take((2,), 1, 0).tolist() for _ in range(2)] == [[1.0, 1.0], [2.0, 2.0]]
    assert 2 * SECONDS <= receives.waited_seconds < 3 * SECONDS


def test_what_was_not_posted_is_named() -> None:
    receives = PostedReceives(Slow())  # type: ignore[arg-type]
    with pytest.raises(CommunicationError, match=r"of rank 1 is wanted on channel .*none was posted"):
        receives.take((2,), 1, 0)
