"""Promised tensors: Python that puts tensors together says what each slice of its result consists of."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from autodist_fx.weights.sources.expressions import Stored
from autodist_fx.weights.sources.module_source import ModuleSource
from autodist_fx.weights.sources.promised import NotFollowedError, Promised

Make = Callable[[list[torch.Tensor]], torch.Tensor]
HEADS, HALF = 2, 3  # rows of a projection: heads * 2 * half


def _by_halves(x: torch.Tensor) -> torch.Tensor:
    """Rows of each head in pairs (a rotary embedding's complex numbers) become its first and second half."""
    return x.view(HEADS, HALF, 2, x.shape[1]).transpose(1, 2).reshape(x.shape)


MADE: dict[str, Make] = {
    "fused experts": lambda x: torch.cat([torch.stack(x[:2], dim=0), torch.stack(x[2:], dim=0)], dim=1),
    "stacked along the last dim": lambda x: torch.stack(x, dim=-1),
    "joined columns": lambda x: torch.cat(x, dim=1),
    "a third": lambda x: torch.chunk(x[0], 3, dim=0)[1].contiguous(),
    "uneven parts, joined anew": lambda x: torch.cat(torch.split(x[0], [2, 7, 3], dim=0)[::-1], dim=0),
    "transposed": lambda x: torch.stack([each.transpose(0, 1).contiguous() for each in x], dim=0),
    "a dim taken out": lambda x: torch.stack(x)[1].t(),
    "unbound": lambda x: torch.cat(torch.unbind(torch.stack(x, dim=1), dim=1), dim=0),
    "part of a stack": lambda x: torch.stack(x)[1:3, :, 2:5].permute(2, 0, 1),
    "flattened": lambda x: torch.stack(x).flatten(0, 1),
    "in heads": lambda x: torch.cat(x, dim=1).unflatten(0, (HEADS, -1)),
    "squeezed": lambda x: torch.chunk(torch.stack(x), 4, dim=0)[2].squeeze(0),
    "halves of heads": lambda x: _by_halves(x[0]),
    "halves of heads, joined": lambda x: torch.cat([_by_halves(each) for each in x], dim=0),
}


@pytest.mark.parametrize("made", MADE)
def test_every_slice_is_that_of_the_tensor_itself(made: str) -> None:
    tensors = [torch.randn(12, 6, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(4)]
    source = ModuleSource({str(i): x for i, x in enumerate(tensors)})
    whole = MADE[made](tensors)
    found = MADE[made]([Promised(Stored(source, str(i)), torch.float32) for i in range(4)])
    assert isinstance(found, Promised) and found.shape == whole.shape and found.dtype == torch.float32
    assert found.expression.shape == tuple(whole.shape) and found.expression.dtype == torch.float64

    for dims in itertools.chain.from_iterable(itertools.combinations(range(whole.dim()), n) for n in range(3)):
        for cut in (lambda n: ((0, n // 2),), lambda n: ((n // 2, n), (0, 1)), lambda n: ()):
            cuts, expected = {d: cut(whole.shape[d]) for d in dims}, whole
            for d, intervals in cuts.items():
                rows = [i for start, stop in intervals for i in range(start, stop)]
                expected = expected.index_select(d, torch.tensor(rows, dtype=torch.int64))
            out = torch.full(expected.shape[::-1], torch.nan, dtype=torch.float64).permute(*range(whole.dim())[::-1])
            found.expression.fill(out, cuts)
            assert torch.equal(out, expected), (dims, cuts)


@pytest.mark.parametrize(
    ("made", "dim", "intervals"),
    [
        ("fused experts", 0, ((1, 2),)),
        ("fused experts", 1, ((0, 3), (12, 15))),
        ("fused experts", 2, ((0, 2), (4, 6))),
        ("a third", 0, ((1, 3),)),
        ("transposed", 1, ((3, 6),)),
        ("transposed", 2, ((3, 6),)),
        ("flattened", 0, ((0, 12), (24, 36))),
        ("in heads", 0, ((1, 2),)),
        ("halves of heads", 0, ((6, 12),)),
        ("halves of heads", 1, ((2, 5),)),
    ],
)
def test_nothing_but_the_slice_is_read(made: str, dim: int, intervals: tuple[tuple[int, int], ...]) -> None:
    source = ModuleSource({str(i): torch.ones(12, 6) for i in range(4)})
    found = MADE[made]([Promised(Stored(source, str(i)), torch.float32) for i in range(4)])
    shape = [sum(b - a for a, b in intervals) if d == dim else size for d, size in enumerate(found.shape)]
    out = torch.empty(shape)
    found.expression.fill(out, {dim: intervals})
    assert source.bytes_read == out.numel() * 4


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda x: x * 2, id="a product"),
        pytest.param(lambda x: x[::2], id="every second row"),
        pytest.param(lambda x: x[[0, 3]], id="rows by indices"),
        pytest.param(lambda x: x.zero_(), id="in place"),
        pytest.param(lambda x: torch.cat([x, torch.ones(1, 6)]), id="joined with a tensor in memory"),
    ],
)
def test_what_is_no_moving_of_elements_is_not_followed(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(NotFollowedError):
        make(Promised(Stored(ModuleSource({"x": torch.ones(12, 6)}), "x"), torch.float32))
