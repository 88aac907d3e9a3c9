"""A short digest of a tensor's elements, which tells it from other tensors of the same shape and dtype."""

from __future__ import annotations

import hashlib

import torch

_HASHED_BYTES = 1 << 20  # a larger tensor is hashed by the sums of its int64 columns, and half as many plain bytes
_COLUMNS = 1024


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return 12 hexadecimal digits that depend on every element of `tensor` (any shape, dtype and device).

    Two tensors that differ in exactly one element have different digests (but for a collision of hashes). The elements
    are read once, on the tensor's own device. A meta or sparse tensor has no readable elements: its layout is returned
    instead.
    """
    if tensor.is_meta or tensor.layout != torch.strided:
        return str(tensor.layout)
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if flat.numel() > _HASHED_BYTES:
        whole = flat.numel() // (8 * _COLUMNS) * (8 * _COLUMNS)
        aligned = flat[:whole] if flat.storage_offset() % 8 == 0 else flat[:whole].clone()
        sums = aligned.view(torch.int64).view(-1, _COLUMNS).sum(0).view(torch.uint8)
        flat = torch.cat([sums, flat[whole:], flat[: _HASHED_BYTES // 2]])
    return hashlib.blake2b(flat.cpu().numpy().tobytes(), digest_size=6).hexdigest()
