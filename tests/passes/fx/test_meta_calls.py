"""Calls on meta tensors, remembered: the same results as without, and what writes or is not torch's runs each time."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from passes.fx.meta_calls import MetaCalls


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.requires_grad
    return type(value), [described(v) for v in value] if isinstance(value, (tuple, list)) else value


CALLS: tuple[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]], ...] = (
    (torch.Tensor.transpose, (meta(2, 3, 4), 1, 2), {}),
    (torch.Tensor.expand, (meta(2, 1, 4), 2, 5, 4), {}),
    (operator.getitem, (meta(5, 6), (slice(1, 4), Ellipsis)), {}),
    (operator.mul, (meta(2, 3), 1), {}),
    (operator.mul, (meta(2, 3, dtype=torch.long), 1), {}),
    (operator.mul, (meta(2, 3, dtype=torch.long), 1.0), {}),
    (torch.topk, (meta(2, 9), 3), {"dim": -1}),
    (torch.Tensor.chunk, (meta(2, 9), 3), {"dim": -1}),
    (torch.Tensor.size, (meta(2, 9),), {}),
    (F.linear, (meta(2, 9), torch.nn.Parameter(meta(4, 9))), {}),
    (torch.cat, ([meta(2, 9), meta(2, 3)],), {"dim": 1}),
)


@pytest.mark.parametrize("call", CALLS, ids=lambda c: f"{c[0].__name__}-{c[1][-1]}"[:40])
def test_a_second_call_gives_a_value_like_the_first(call: tuple[Callable[..., Any], tuple[Any, ...], Any]) -> None:
    function, args, kwargs = call
    calls, ran = MetaCalls(), []

    def run(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        ran.append(function)
        return function(*args, **kwargs)

    expected = described(function(*args, **kwargs))
    results = [calls(function, args, kwargs, run) for _ in range(2)]
    assert [described(result) for result in results] == [expected, expected] and len(ran) == 1
    if isinstance(results[0], torch.Tensor):
        assert results[0] is not results[1]


def test_other_shapes_numbers_and_kinds_of_numbers_are_other_calls() -> None:
    calls = MetaCalls()
    assert calls(torch.sum, (meta(2, 3), 0), {}).shape == (3,)
    assert calls(torch.sum, (meta(2, 3), 1), {}).shape == (2,)
    assert calls(torch.sum, (meta(4, 3), 1), {}).shape == (4,)
    assert calls(operator.add, (meta(2, dtype=torch.long), 1), {}).dtype == torch.long
    assert calls(operator.add, (meta(2, dtype=torch.long), 1.0), {}).dtype == torch.float32
    assert calls(operator.add, (meta(2, dtype=torch.long), True), {}).dtype == torch.long


def test_what_is_not_torchs_or_writes_or_fails_runs_each_time() -> None:
    calls, numbers = MetaCalls(), iter(range(9))

    def lengths(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(next(numbers))

    assert [len(calls(lengths, (meta(2),), {})) for _ in range(2)] == [0, 1]
    x = meta(2, 3)
    assert calls(torch.Tensor.unsqueeze_, (x, 0), {}) is x and calls(torch.Tensor.unsqueeze_, (x, 0), {}) is x
    assert x.shape == (1, 1, 2, 3)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            calls(torch.matmul, (meta(2, 3), meta(2, 3)), {})
