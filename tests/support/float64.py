"""A world without float32: models that cast to it inside compute in float64 throughout, as they would in exact numbers.

Such casts (norms, rotary tables, the logits of a loss) turn a last bit of float64 into one of float32, and a gradient
can then be compared to 1e-6 only, which some wrong gradients are near.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

import autodist_fx.api.train  # noqa: F401  modules with tables of dtypes are imported before float32 is hidden


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
