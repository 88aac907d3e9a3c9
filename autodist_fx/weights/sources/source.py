"""`WeightSource`: the names and shapes of a checkpoint's tensors, and any slice of one without reading the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from autodist_fx.errors import CheckpointError
from cost_model.graph.placement import Interval


class WeightSource(Protocol):
    """A checkpoint's tensors by name, read in slices."""

    @property
    def bytes_read(self) -> int:
        """Bytes of the slices read so far, in the checkpoint's own dtypes.

        The disk may give a little more: runs of less than a page come with their surroundings.
        """
        ...

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of all tensors in the checkpoint, in its own dtypes."""
        ...

    def names(self) -> set[str]:
        """Return the names of the checkpoint's tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the whole tensor. Raises CheckpointError when there is no such tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which the tensor is stored. Raises CheckpointError when there is no such tensor."""
        ...

    def read(
        self,
        name: str,
        dim: int | None = None,
        intervals: Sequence[Interval] = (),
        dtype: torch.dtype | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the elements `intervals` ([start, stop), in this
        order) of dim `dim`, concatenated; all where `dim` is None.

        The result has the given `dtype` (the checkpoint's own when None). With `out`, of the result's shape and on any
        device, it is written there instead and `out` is returned; its dtype then wins.

        Raises CheckpointError for an unknown name, a dim or an interval outside of the tensor, or an `out` of another
        shape.
        """
        ...

    def fingerprint(self) -> str:
        """Digest all names, shapes and dtypes and a sample of every tensor's bytes (see sample.py).

        Equal contents give equal digests, however they lie in files. It reads a few KiB per tensor.
        """
        ...

    def close(self) -> None:
        """Close files and free tensors. Nothing can be read afterwards."""
        ...


def sliced_shape(
    name: str, shape: tuple[int, ...], dim: int | None, intervals: Sequence[Interval], out: torch.Tensor | None
) -> tuple[int, ...]:
    """Return the shape of the result of `read`. Raises CheckpointError when the request does not fit the tensor."""
    if dim is None:
        result = shape
    else:
        if not 0 <= dim < len(shape):
            raise CheckpointError(f"{name} has shape {list(shape)}, so there is no dim {dim} to slice")
        for start, stop in intervals:
            if not 0 <= start <= stop <= shape[dim]:
                raise CheckpointError(
                    f"{name} has shape {list(shape)}: [{start}, {stop}) is outside of dim {dim}; "
                    "the plan is of another model, make it again for this checkpoint"
                )
        result = (*shape[:dim], sum(b - a for a, b in intervals), *shape[dim + 1 :])
    if out is not None and tuple(out.shape) != result:
        raise CheckpointError(f"{name}: the slice has shape {list(result)}, but `out` has {list(out.shape)}")
    return result
