"""Random ops: Philox itself, the rate and independence of its masks, and that each part is that of the whole."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from passes.ops.random import keep_mask, philox_4x32, random_state, seeded_dropout, seeded_uniform

_ONES, _PI = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
# Known answers of Random123's kat_vectors, which Salmon et al. publish beside the paper: counter, key -> four words.
_KNOWN = (
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((_ONES,) * 4, (_ONES,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (_PI, (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


@pytest.mark.parametrize(("counter", "key", "answer"), _KNOWN)
def test_known_answers_of_philox(counter: tuple[int, ...], key: tuple[int, int], answer: str) -> None:
    seed = key[0] | key[1] << 32
    seed_tensor = torch.tensor(seed - (1 << 64 if seed >> 63 else 0))
    words = philox_4x32([torch.tensor([word, word]) for word in counter], seed_tensor)
    assert " ".join(f"{int(word[1]):08x}" for word in words) == answer


SHAPE, ROWS = (6, 5, 7, 10), (0, 1, 1)


def _mask(
    op: int = 3, *, seed: int = 1, step: int = 2, first_row: int = 0, p: float = 0.3, **more: Any
) -> torch.Tensor:
    return keep_mask(random_state(seed, step, first_row), op, p, **{"shape": SHAPE, "row": ROWS, **more})


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("runs", [((0, 3),), ((2, 5),), ((4, 5),), ((0, 1), (3, 5)), ((0, 0), (1, 4))])
def test_a_part_is_that_of_the_whole(dim: int, runs: tuple[tuple[int, int], ...]) -> None:
    whole = _mask()
    wanted = torch.cat([whole.narrow(dim, start, stop - start) for start, stop in runs], dim)
    assert torch.equal(_mask(shape=tuple(wanted.shape), cut=(dim, SHAPE[dim], runs)), wanted)


def test_microbatches_have_the_rows_of_the_whole_batch() -> None:
    whole = _mask()
    for start, stop in ((0, 2), (2, 5), (5, 6)):
        assert torch.equal(_mask(first_row=start, shape=(stop - start, *SHAPE[1:])), whole[start:stop])


def test_rows_lie_along_any_dim_and_folded() -> None:
    """The same bits, wherever a model has the batch: [B * heads, S, T], [heads * B, S, T], [heads, B, S, T], [B]."""
    whole = _mask()
    batch_first = _mask(shape=(30, 7, 10), row=(0, 1, 5))
    heads_first = _mask(shape=(30, 7, 10), row=(0, 5, 1))
    assert torch.equal(batch_first.view(SHAPE), whole)
    assert torch.equal(heads_first.view(5, 6, 7, 10), whole.transpose(0, 1))
    assert torch.equal(_mask(shape=(5, 6, 7, 10), row=(1, 1, 1)), whole.transpose(0, 1))
    assert torch.equal(_mask(shape=(6,), row=(0, 1, 1)), _mask(shape=(6, 1, 1), row=(0, 1, 1)).flatten())


def test_without_rows_all_of_them_have_one_mask() -> None:
    assert torch.equal(_mask(row=None, first_row=0), _mask(row=None, first_row=4))


_OTHERS: tuple[dict[str, int], ...] = (
    {}, {"op": 4}, {"step": 3}, {"seed": 2}, {"seed": 1 + 2**32}, {"first_row": 300},
)  # fmt: skip


def test_rate_and_independence() -> None:
    """Rates within five standard deviations, and so the agreements of any two masks: by op, step, seed, and row."""
    p, n = 0.3, math.prod(SHAPE) * 50
    masks = [
        _mask(p=p, shape=(300, *SHAPE[1:]), **changed)
        for changed in _OTHERS
    ]
    for mask in masks:
        assert abs(int((~mask).sum()) - n * p) <= 5 * math.sqrt(n * p * (1 - p))
    agreed = p**2 + (1 - p) ** 2
    first = masks[0]
    shifted = [(first[1:], first[:-1]), (first[:, 1:], first[:, :-1]), (first[..., 1:], first[..., :-1])]
    for a, b in (*itertools.combinations(masks, 2), *shifted):
        assert abs(int((a == b).sum()) - a.numel() * agreed) <= 5 * math.sqrt(a.numel() * agreed * (1 - agreed))


def test_dropout_and_its_gradient() -> None:
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    y = seeded_dropout(x, random_state(1, 2), 3, 0.3, 4, ROWS)
    mask = _mask().double()
    assert torch.allclose(y, x * mask / 0.7, rtol=1e-14, atol=0.0)
    y.backward(torch.ones_like(y) * 2)
    assert torch.allclose(x.grad, mask * 2 / 0.7, rtol=1e-14, atol=0.0)  # type: ignore[arg-type]
    assert not seeded_dropout(x, random_state(), 0, 1.0, 4, ROWS).any()


def test_channels_are_dropped_whole() -> None:
    y = seeded_dropout(torch.ones(SHAPE), random_state(1, 2), 3, 0.3, 2, ROWS)
    per_channel = y.flatten(2)
    assert torch.equal(per_channel.amin(-1), per_channel.amax(-1))
    assert torch.equal(per_channel.any(-1), _mask(shape=SHAPE[:2]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_uniform_numbers(dtype: torch.dtype) -> None:
    drawn = seeded_uniform(random_state(5), 0, (300, 40), dtype, -1.0, 3.0, ROWS)
    assert drawn.dtype == dtype
    assert -1.0 <= float(drawn.min()) <= -0.99 and 2.96 <= float(drawn.max()) <= 3.0
    rounded_down = 2.0**-7 if dtype == torch.bfloat16 else 0.0
    assert abs(float(drawn.double().mean()) - 1.0) <= 5 * 4 / math.sqrt(12 * drawn.numel()) + rounded_down
    rows = seeded_uniform(random_state(5, 0, 7), 0, (3, 40), dtype, -1.0, 3.0, ROWS)
    assert torch.equal(rows, drawn[7:10])


def test_large_tensors_are_drawn_in_chunks_as_if_they_were_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _mask()
    monkeypatch.setattr("passes.ops.random._CHUNK_OF_CORE", 4)
    assert torch.equal(_mask(), whole)


def test_blocks_beyond_32_bits_have_places_of_their_own() -> None:
    """A tensor [1, 2**33, 8]: its first lines, and those whose blocks have the same lower 32 bits."""
    near, far = (_mask(shape=(1, 40, 8), cut=(1, 2**33, ((at, at + 40),))) for at in (0, 2**31))
    assert not torch.equal(near, far)


def test_numbers_out_of_bounds_are_refused() -> None:
    for given in ({"seed": -1}, {"seed": 2**63}, {"step": 2**32}, {"first_row": -1}):
        with pytest.raises(ValueError, match=next(iter(given))):
            random_state(**given)
    with pytest.raises(ValueError, match="random op number"):
        _mask(op=2**16)
