"""The allow-list of functions that a saved graph may call, by name; a name from a file is never imported.

    "torch.reshape"  "F.silu"  "operator.add"  "aten.sym_size.int"  "comm.all_reduce"  "ours.with_item"  methods: "view"

Functions of tensors and numbers alone: none reads or writes a file, starts anything, or reaches Python's objects.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from passes.ops import (
    attention,
    buffers,
    data_dependent,
    experts,
    functional_writes,
    losses,
    parallel_layers,
    random,
    strided,
)
from passes.ops import comm as comm_ops

_TORCH = """
    abs acos add addbmm addcdiv addcmul addmm all amax amin aminmax any arange argmax argmin argsort asin atan
    atan2 baddbmm bernoulli bincount bitwise_and bitwise_not bitwise_or bitwise_xor bmm broadcast_tensors
    broadcast_to bucketize cat cdist ceil chunk clamp clamp_max clamp_min clone complex concat concatenate conv1d
    conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d cos cosh count_nonzero cross cummax cummin
    cumprod cumsum diag diag_embed diagonal diff div dot einsum empty empty_like eq equal erf erfc exp exp2 expm1
    eye fft.fft fft.fft2 fft.fftn fft.ifft fft.irfft fft.rfft finfo flatten flip floor floor_divide fmod frac full
    full_like gather ge greater greater_equal gt histc hypot index_add index_copy index_fill index_select inner
    inverse is_floating_point isclose isfinite isinf isnan kron le lerp less less_equal linalg.norm
    linalg.vector_norm linspace log log10 log1p log2 log_softmax logaddexp logical_and logical_not logical_or
    logical_xor logsumexp lt masked_fill masked_scatter masked_select matmul max maximum mean median meshgrid min
    minimum mm movedim mul multiply mv nan_to_num narrow ne neg negative nonzero nonzero_static norm not_equal numel
    ones ones_like outer permute polar positive pow prod quantile ravel real reciprocal relu remainder repeat_interleave
    reshape roll round rsqrt rsub scatter scatter_add scatter_reduce searchsorted select sigmoid sign sin sinc sinh
    slice_scatter softmax sort split sqrt square squeeze stack std std_mean sub subtract sum swapaxes swapdims t
    take take_along_dim tan tanh tensor tensor_split tensordot tile topk trace transpose tril triu true_divide
    trunc unbind unflatten unique unique_consecutive unsqueeze var var_mean view_as_complex view_as_real vstack
    hstack dstack where xlogy zeros zeros_like imag conj angle erfinv special.expit logit scalar_tensor isneginf
    isposinf tril_indices triu_indices heaviside fill rot90 celu selu prelu rrelu index_put layer_norm group_norm
    batch_norm instance_norm rms_norm embedding dropout
"""
_F = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d avg_pool1d
    avg_pool2d avg_pool3d batch_norm celu cosine_similarity cross_entropy dropout dropout1d dropout2d elu embedding
    fold gelu glu group_norm hardshrink hardsigmoid hardswish hardtanh instance_norm interpolate l1_loss layer_norm
    leaky_relu linear log_softmax logsigmoid max_pool1d max_pool2d max_pool3d mish mse_loss nll_loss normalize
    one_hot pad pixel_shuffle pixel_unshuffle prelu relu relu6 rms_norm scaled_dot_product_attention selu sigmoid
    silu softmax softmin softplus softshrink softsign tanh tanhshrink threshold unfold binary_cross_entropy
    binary_cross_entropy_with_logits smooth_l1_loss conv1d conv2d conv3d conv_transpose1d conv_transpose2d
    conv_transpose3d grid_sample affine_grid bilinear
"""
_OPERATOR = """
    add sub mul truediv floordiv mod pow matmul neg pos invert and_ or_ xor not_ lshift rshift lt le eq ne gt ge
    getitem abs is_ is_not setitem iadd isub imul itruediv
"""
_BUILTINS = "getattr int float bool abs max min len round sum"  # getattr: of ATTRIBUTES alone
_MATH = "ceil floor sqrt log log2 exp prod trunc"
_OURS: dict[Any, str] = {
    attention: "safe_softmax",
    buffers: "write_buffers",
    comm_ops: " ".join(function.__name__ for function in comm_ops.CALLED),
    data_dependent: "selected split_rows join_rows join_own_rows bincount",
    experts: "experts",
    functional_writes: "with_item copied changed_by",
    losses: "cross_entropy_part",
    parallel_layers: "partial_mean one_term one_gradient",
    random: "seeded_dropout seeded_uniform",
    strided: "strided",
}

# Of tensors, of the sizes and dtypes that graphs compute with, and (the last line) of a KV cache.
_METHODS = """
    abs add addcmul all amax amin any argmax argmin argsort baddbmm bitwise_and bitwise_not bitwise_or bmm bool
    broadcast_to byte ceil chunk clamp clamp_max clamp_min clone contiguous cos cosh cpu cummax cumprod cumsum
    detach diag diag_embed diagonal diff dim div double eq erf exp expand expand_as expm1 flatten flip float floor
    floor_divide fmod frac gather ge gt half histc bfloat16 index_add index_copy index_fill index_put index_select
    int is_floating_point isfinite isinf isnan isneginf item kthvalue le lerp log log10 log1p log2 log_softmax
    logical_and logical_not logical_or logical_xor logsumexp long lt masked_fill masked_scatter masked_select
    matmul max maximum mean median min minimum mm movedim mul multiply nan_to_num narrow ndimension ne neg
    new_empty new_full new_ones new_tensor new_zeros nonzero norm numel permute pow prod ravel reciprocal relu
    remainder repeat repeat_interleave requires_grad_ reshape reshape_as roll round rsqrt scatter scatter_add
    scatter_reduce select short sigmoid sign sin sinh size softmax sort split split_with_sizes sqrt square squeeze
    std sub subtract sum swapaxes swapdims t tan tanh tensor_split tile to topk trace transpose tril triu
    true_divide trunc type type_as unbind unflatten unfold unsqueeze var view view_as where stride
    update read get_mask_sizes get_seq_length
"""
METHODS = frozenset(_METHODS.split())
# What `getattr` may read of a tensor, a size or a dtype.
_ATTRIBUTES = "shape dtype device ndim T mT H mH real imag itemsize nbytes min max eps tiny"
ATTRIBUTES = frozenset(_ATTRIBUTES.split())
# The names that a function takes as its second argument: nothing but these may stand there.
NAMED: dict[str, frozenset[str]] = {
    "builtins.getattr": ATTRIBUTES,
    "ours.changed_by": frozenset({"fill_diagonal_"}),
}


@cache
def functions() -> dict[str, Callable[..., Any]]:
    """Returns {saved name: function}, the allow-list. Names that this torch does not have are left out."""
    found: dict[str, Callable[..., Any]] = {"aten.sym_size.int": torch.ops.aten.sym_size.int}
    spaces = (("operator", operator, _OPERATOR), ("builtins", builtins, _BUILTINS), ("math", math, _MATH))
    ours = tuple(("comm" if m is comm_ops else "ours", m, names) for m, names in _OURS.items())
    for space, home, names in (*spaces, *ours, ("torch", torch, _TORCH), ("F", F, _F)):
        for name in names.split():
            value = home
            for atom in name.split("."):
                value = getattr(value, atom, None)
            if callable(value):
                found[f"{space}.{name}"] = value
    return found


@cache
def names() -> dict[Callable[..., Any], str]:
    """Returns {function: saved name}; a function that torch has under several names goes by the first."""
    found: dict[Callable[..., Any], str] = {}
    for name, function in functions().items():
        found.setdefault(function, name)
    return found
