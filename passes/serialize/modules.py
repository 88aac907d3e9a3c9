"""Writes leaf modules of a graph as plain data: class by name, and the numbers that its forward reads.

    {"class": "RowParallelLinear", "in_features": 32, "out_features": 64, "transposed": false}

A module is made without its constructor, which allocates and draws random numbers; its tensors are set by whoever makes
it. Only classes of a given table are made, and only their own attributes set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from passes.ops.parallel_layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

Kinds = Mapping[str, tuple[type[nn.Module], tuple[str, ...]]]  # name -> (class, what its forward reads)

_LINEAR = ("in_features", "out_features", "transposed")
_OURS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "ColumnParallelLinear": (ColumnParallelLinear, _LINEAR),
    "RowParallelLinear": (RowParallelLinear, _LINEAR),
    "VocabParallelEmbedding": (VocabParallelEmbedding, ("intervals", "rows", "num_embeddings", "padding_idx")),
}
_TORCH = """
    Linear Embedding LayerNorm RMSNorm GroupNorm Identity Dropout Dropout1d Dropout2d AlphaDropout GELU ReLU ReLU6
    SiLU Tanh Sigmoid LeakyReLU ELU CELU SELU Mish Hardtanh Hardswish Hardsigmoid Softplus Softsign LogSigmoid
    Tanhshrink Softshrink Hardshrink GLU PReLU Threshold Softmax LogSoftmax Softmin ZeroPad1d ZeroPad2d
    ConstantPad1d ConstantPad2d ConstantPad3d ReflectionPad1d ReflectionPad2d ReplicationPad1d ReplicationPad2d
    Upsample PixelShuffle PixelUnshuffle Unfold Fold Flatten Unflatten AvgPool1d AvgPool2d AvgPool3d MaxPool1d
    MaxPool2d MaxPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d
    Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d BatchNorm1d BatchNorm2d BatchNorm3d
    Bilinear CosineSimilarity
"""
# torch lists what a forward reads for TorchScript; these lists leave something out.
_MORE = {
    "PixelShuffle": ("upscale_factor",), "PixelUnshuffle": ("downscale_factor",), "Upsample": ("mode",),
    "Conv1d": ("_reversed_padding_repeated_twice",), "Conv2d": ("_reversed_padding_repeated_twice",),
    "Conv3d": ("_reversed_padding_repeated_twice",), "Softmin": ("dim",), "CosineSimilarity": ("dim", "eps"),
}  # fmt: skip

KINDS: Kinds = _OURS | {
    f"nn.{name}": (
        getattr(nn, name),
        tuple(dict.fromkeys((*getattr(getattr(nn, name), "__constants__", ()), *_MORE.get(name, ())))),
    )
    for name in _TORCH.split()
}


def described(module: nn.Module, kinds: Kinds) -> dict[str, Any] | None:
    """Returns a leaf module's class and numbers; None where its class is not in the table or it has modules inside."""
    if any(child is not None for child in module._modules.values()):
        return None
    for name, (cls, attributes) in kinds.items():
        if type(module) is cls:
            return {"class": name, **{a: getattr(module, a) for a in attributes if hasattr(module, a)}}
    return None


def made(description: Mapping[str, Any], kinds: Kinds) -> nn.Module:
    """Makes the module, in eval mode, with every parameter and buffer None. Raises KeyError for a class or attribute
    that the table does not have."""
    cls, attributes = kinds[description["class"]]
    module: nn.Module = object.__new__(cls)
    nn.Module.__init__(module)
    for name, value in description.items():
        if name != "class":
            if name not in attributes:
                raise KeyError(name)
            object.__setattr__(module, name, value)
    # what forward asks for and this one does not have ("bias" of a linear without) is None, as constructors leave it
    for name in ("weight", "bias"):
        module.register_parameter(name, None)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        if issubclass(cls, nn.modules.batchnorm._NormBase):
            module.register_buffer(name, None)
    return module.eval()
