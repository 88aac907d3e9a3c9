"""Mends transformers' HFTracer (`utils.fx`, which 4.57 ships): how it finds the examples of values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx._symbolic_trace as fx_symbolic_trace
from transformers.utils import fx as hf_fx
from transformers.utils.fx import HFAttribute as AttributeProxy
from transformers.utils.fx import HFProxy as SymbolicProxy
from transformers.utils.fx import HFTracer as SymbolicTracer
from transformers.utils.fx import MetaDeviceAttribute as DeviceAttribute
from transformers.utils.fx import get_concrete_args

Patch = Callable[[Any, str, Any], None]  # (owner, name, value), undone when tracing is over


def patch_base(patch: Patch) -> None:
    """Let torch's own meta kernels say what traced values are: they know dtypes, which HFTracer's overrides do not."""
    patch(hf_fx, "_MANUAL_META_OVERRIDES", _MetaKernelsFirst(hf_fx._MANUAL_META_OVERRIDES))
    patch(hf_fx, "_proxies_to_metas", _to_metas(hf_fx._proxies_to_metas))
    patch(hf_fx, "_IS_IN_DEBUG_MODE", True)  # an op that cannot be run on meta is reported, not passed over
    patch(hf_fx, "warnings", _ReportToTracer)
    if hasattr(fx_symbolic_trace, "is_fx_symbolic_tracing"):  # what is_fx_tracing warns to use instead
        patch(hf_fx, "is_fx_tracing", fx_symbolic_trace.is_fx_symbolic_tracing)


class _MetaKernelsFirst(dict[Any, Callable[..., Any]]):
    """Is HFTracer's table of shape functions, consulted only where torch cannot run an op on meta tensors.

    The table ignores dtypes (a bfloat16 linear comes out float32) and computes some shapes on CPU tensors.
    """

    def __init__(self, overrides: dict[Any, Callable[..., Any]]) -> None:
        # Modules keep none: their own forward runs on meta tensors.
        super().__init__({target: shape_of for target, shape_of in overrides.items() if not isinstance(target, type)})

    def get(self, target: Any, default: Any = None) -> Any:
        override = super().get(target)
        if override is None:
            return default

        def meta_kernel_or_override(*args: Any, **kwargs: Any) -> Any:
            try:
                return default(*args, **kwargs)
            except Exception:
                return override(*args, **kwargs)

        return meta_kernel_or_override


def _to_metas(proxies_to_metas: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Move constant tensors to meta, too: torch refuses to mix meta with another device."""

    def to_metas(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to("meta")
        if isinstance(value, DeviceAttribute):
            return torch.device("meta")  # HFTracer says "meta", which has no .type
        return proxies_to_metas(value)

    return to_metas


class _ReportToTracer:
    """Stands in for `warnings` in HFTracer's module, whose only warning is of a value that has no metadata."""

    @staticmethod
    def warn(message: str) -> None:
        tracer = hf_fx._CURRENT_TRACER
        if tracer is not None and tracer.first_failure is None:
            tracer.first_failure = message


__all__ = [
    "AttributeProxy", "DeviceAttribute", "SymbolicProxy", "SymbolicTracer", "get_concrete_args", "patch_base",
]  # fmt: skip
