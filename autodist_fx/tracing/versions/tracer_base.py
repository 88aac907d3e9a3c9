"""Chooses the symbolic tracer that ours is built on: transformers' own where it ships one (4.57), else own_tracer.py
(5)."""

from __future__ import annotations

try:
    from autodist_fx.tracing.versions.hf_tracer import (
        AttributeProxy,
        DeviceAttribute,
        SymbolicProxy,
        SymbolicTracer,
        get_concrete_args,
        patch_base,
    )
except ImportError:  # transformers 5 has no utils.fx
    from autodist_fx.tracing.versions.own_tracer import (
        AttributeProxy,
        DeviceAttribute,
        SymbolicProxy,
        SymbolicTracer,
        get_concrete_args,
        patch_base,
    )

__all__ = [
    "AttributeProxy", "DeviceAttribute", "SymbolicProxy", "SymbolicTracer", "get_concrete_args", "patch_base",
]  # fmt: skip
