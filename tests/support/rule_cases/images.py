"""Cases of the rules of images, for test_op_rules: what runs on a share of channels. An argument that counts groups is
the share's, as localize_shapes writes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch.nn import functional as F

Tensors = Sequence[torch.Tensor]
Run = Callable[[Tensors, Any], torch.Tensor]
Made = tuple[tuple[torch.Tensor, ...], Run, dict[str, Any]]  # inputs, the op on a share of them, attributes

_sizes = st.integers(1, 4)


def _image(data: st.DataObject, channels: int, least: int = 1) -> torch.Tensor:
    spatial = data.draw(st.lists(st.integers(least, 5), min_size=2, max_size=2))
    return torch.rand(data.draw(_sizes), channels, *spatial, dtype=torch.float64) + 0.1


def _vector(n: int) -> torch.Tensor:
    return torch.rand(n, dtype=torch.float64) + 0.5


def conv(data: st.DataObject) -> Made:
    groups, i, o = data.draw(st.sampled_from([1, 1, 2, 3, 4])), data.draw(_sizes), data.draw(_sizes)
    transposed, has_bias = data.draw(st.booleans()), data.draw(st.booleans())
    kernel = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=2))
    x = _image(data, groups * i, least=3)
    shape = (groups * i, o, *kernel) if transposed else (groups * o, i, *kernel)
    weight = torch.randn(*shape, dtype=torch.float64)
    stride, padding = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 1))
    if transposed and padding:
        x = torch.nn.functional.pad(x, (1, 1, 1, 1))

    def run(x: Tensors, share: Any) -> torch.Tensor:
        # a sum over ranks adds the bias once: rank 0's
        bias = x[2] if has_bias and not (share.factor == "row" and share.rank > 0) else None
        own = groups if share.factor != "groups" else x[0].shape[1] // i
        if x[0].shape[1] == 0 or x[1].shape[0] == 0 or x[1].shape[1] == 0:
            # torch refuses it, and so does the search (`filled`): what would come out
            return _nothing(share, bias)
        if transposed:
            return F.conv_transpose2d(x[0], x[1], bias, stride, padding, 0, own)
        return F.conv2d(x[0], x[1], bias, stride, padding, 1, own)

    def _nothing(share: Any, bias: torch.Tensor | None) -> torch.Tensor:
        out = torch.zeros(share.out_shapes[0], dtype=torch.float64)
        return out if bias is None else out + bias[:, None, None]

    inputs = (x, weight, *((_vector(groups * o),) if has_bias else ()))
    return inputs, run, {"groups": groups, "transposed": transposed}


def batch_norm(data: st.DataObject) -> Made:
    channels, given, affine = data.draw(_sizes), data.draw(st.booleans()), data.draw(st.booleans())
    x = _image(data, channels, least=2)
    statistics = (_vector(channels), _vector(channels)) if given else ()
    scale = (_vector(channels), _vector(channels)) if affine else ()

    def run(x: Tensors, share: Any) -> torch.Tensor:
        if not x[0].numel():
            return x[0]
        mean, variance = x[1:3] if given else (None, None)
        weight, bias = x[-2:] if affine else (None, None)
        return F.batch_norm(x[0], mean, variance, weight, bias, not given, 0.0, 1e-5)

    return (x, *statistics, *scale), run, {"statistics": given}


def group_norm(data: st.DataObject) -> Made:
    groups, each, affine = data.draw(_sizes), data.draw(_sizes), data.draw(st.booleans())
    x = _image(data, groups * each, least=2)
    scale = (_vector(groups * each), _vector(groups * each)) if affine else ()

    def run(x: Tensors, share: Any) -> torch.Tensor:
        if x[0].shape[1] == 0:
            return x[0]
        return F.group_norm(x[0], x[0].shape[1] // each, *x[1:])

    return (x, *scale), run, {"groups": groups}


_POOLS: dict[str, tuple[bool, Callable[[torch.Tensor], torch.Tensor]]] = {
    "average": (True, lambda x: F.avg_pool2d(x, 2)),
    "adaptive average": (True, lambda x: F.adaptive_avg_pool2d(x, 1)),
    "largest": (False, lambda x: F.max_pool2d(x, 2)),
    "resized": (True, lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "zeros around": (True, lambda x: F.pad(x, (1, 0, 2, 1))),
    "ones around": (False, lambda x: F.pad(x, (1, 0, 2, 1), value=1.0)),
    "reflected": (True, lambda x: F.pad(x, (1, 0, 0, 1), mode="reflect")),
}


def pool(data: st.DataObject) -> Made:
    linear, function = _POOLS[data.draw(st.sampled_from(sorted(_POOLS)))]
    x = _image(data, data.draw(_sizes), least=2)

    def run(x: Tensors, share: Any) -> torch.Tensor:
        if x[0].numel():
            return function(x[0])
        return torch.zeros(share.out_shapes[0], dtype=torch.float64)  # see `filled`

    return (x,), run, {"spatial": 2, "linear": linear}


IMAGE_CASES = {"conv": conv, "batch_norm": batch_norm, "group_norm": group_norm, "pool": pool}
