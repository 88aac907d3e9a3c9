"""Reads weights from a model in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from autodist_fx.errors import CheckpointError
from autodist_fx.weights.sources.sample import fingerprint, sampled
from autodist_fx.weights.sources.source import sliced_shape
from cost_model.graph.placement import Interval

_ALIGNMENT = 64  # bytes: torch allocates memory at multiples of it


class ModuleSource:
    """Slices of an nn.Module's parameters and buffers (under all names of a tied one), or of a state dict.

    Slices are copies, so that the model can be freed. With `share`, a slice of a parameter is a view of the model's own
    memory, if it is contiguous there and wanted in its dtype: ranks in one process then hold replicated weights once,
    and those cut along the first dim, too. Buffers are copied, since a forward pass may write into them. Raises
    CheckpointError when the model is on the meta device.
    """

    def __init__(self, state: nn.Module | Mapping[str, torch.Tensor], *, share: bool = False) -> None:
        if isinstance(state, nn.Module):
            tensors = dict(state.named_parameters(remove_duplicate=False))
            self._shared = frozenset(tensors if share else ())
            tensors.update(state.named_buffers(remove_duplicate=False))
        else:
            tensors, self._shared = dict(state), frozenset(state if share else ())
        on_meta = next((name for name, t in tensors.items() if t.is_meta), None)
        if on_meta is not None:
            raise CheckpointError(
                f"the model is on the meta device ({on_meta}) and has no weights: pass a checkpoint's path, "
                "or build the model on a real device"
            )
        self._tensors = tensors
        self._bytes_read = 0

    @property
    def bytes_read(self) -> int:
        return self._bytes_read

    @property
    def checkpoint_bytes(self) -> int:
        unique = {id(t): t.numel() * t.element_size() for t in self._tensors.values()}  # a tied tensor counts once
        return sum(unique.values())

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensor(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensor(name).dtype

    def read(
        self,
        name: str,
        dim: int | None = None,
        intervals: Sequence[Interval] = (),
        dtype: torch.dtype | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See WeightSource.read."""
        tensor = self._tensor(name)
        shape = sliced_shape(name, tuple(tensor.shape), dim, intervals, out)
        if out is None:
            lends = name in self._shared and dtype in (None, tensor.dtype)
            piece = _one_piece(tensor, dim, intervals) if lends else None
            if piece is not None:
                return piece
            out = torch.empty(shape, dtype=dtype or tensor.dtype, device=tensor.device)
        if dim is None:
            out.copy_(tensor)
            self._bytes_read += tensor.numel() * tensor.element_size()
            return out
        at = 0
        for start, stop in intervals:
            out.narrow(dim, at, stop - start).copy_(tensor.narrow(dim, start, stop - start))
            at += stop - start
        self._bytes_read += out.numel() * tensor.element_size()
        return out

    def fingerprint(self) -> str:
        """See WeightSource.fingerprint."""
        return fingerprint(
            (name, str(t.dtype), tuple(t.shape), _sample(name, t.detach())) for name, t in self._tensors.items()
        )

    def close(self) -> None:
        self._tensors = {}

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"the model in memory has no tensor {name}: is it the model that was compiled?")
        return self._tensors[name].detach()


def _one_piece(tensor: torch.Tensor, dim: int | None, intervals: Sequence[Interval]) -> torch.Tensor | None:
    """Return the slice as a view of the tensor's own memory; None where it is not
    contiguous there, or not aligned as memory of its own would be: a matmul may
    then round otherwise, and a simulation differ from processes in the last bit."""
    if dim is None:
        return tensor
    if len(intervals) != 1:
        return None
    start, stop = intervals[0]
    piece = tensor.narrow(dim, start, stop - start)
    return piece if piece.is_contiguous() and piece.data_ptr() % _ALIGNMENT == 0 else None


def _sample(name: str, tensor: torch.Tensor) -> bytes:
    """Return the bytes of the tensor that stand for all of it in a fingerprint."""
    flat, size = tensor.contiguous().view(-1), tensor.element_size()
    blocks = [flat[start // size : stop // size] for start, stop in sampled(name, flat.numel() * size)]
    return torch.cat(blocks).view(torch.uint8).cpu().numpy().tobytes()
