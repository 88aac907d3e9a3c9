"""graph_text: a graph as text that people read and diffs compare; one line a node.

    q_proj : f32[B, S, 32] = call_module[model.layers.0.self_attn.q_proj](mul_3)    # ColumnParallelLinear(64 -> 32)
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
import torch.fx

from passes.fx import node_meta

_SHORT = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.bool: "bool",
}  # fmt: skip


def graph_text(module: torch.fx.GraphModule) -> str:
    """Formats every node with its type, target and arguments. Shapes are those of the whole tensors."""
    return "\n".join(node_text(module, node) for node in module.graph.nodes)


def graph_diff(before: torch.fx.GraphModule, after: torch.fx.GraphModule, *, context: int = 3) -> str:
    """Returns the unified diff between two graphs' texts; empty when they are the same."""
    lines = difflib.unified_diff(
        graph_text(before).splitlines(),
        graph_text(after).splitlines(),
        type(before).__name__,
        type(after).__name__,
        lineterm="",
        n=context,
    )
    return "\n".join(lines)


def node_text(module: torch.fx.GraphModule, node: torch.fx.Node, named: bool = True) -> str:
    """Formats one node's line. Without `named`, the nodes that it reads are all called "_"."""

    def text(value: Any) -> str:
        return _value(value) if named else _value(torch.fx.node.map_arg(value, lambda read: _ANY))

    if node.op == "output":
        return f"return {text(node.args[0])}"
    kind = _type(node)
    left = f"{node.name}{' : ' + kind if kind else ''}"
    if node.op == "placeholder":
        return f"{left} = input"
    if node.op == "get_attr":
        return f"{left} = {node.target}"
    arguments = ", ".join([*(text(a) for a in node.args), *(f"{k}={text(v)}" for k, v in node.kwargs.items())])
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        return f"{left} = {node.target}({arguments})  # {_module(called)}"
    return f"{left} = {'.' if node.op == 'call_method' else ''}{node_kind(module, node)}({arguments})"


def node_kind(module: torch.fx.GraphModule, node: torch.fx.Node) -> str:
    """Returns the name of a node's op, or the class of the module that it calls; "input", "get_attr" and "return" for
    the others."""
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    if node.op in ("call_function", "call_method"):
        return str(getattr(node.target, "__name__", node.target))
    return {"placeholder": "input", "output": "return"}.get(node.op, node.op)


class _Any:
    def __repr__(self) -> str:
        return "_"


_ANY = _Any()


def _module(module: torch.nn.Module) -> str:
    weight = getattr(module, "weight", None)
    shape = list(weight.shape) if isinstance(weight, torch.Tensor) else ""
    return f"{type(module).__name__}{shape}"


def _type(node: torch.fx.Node) -> str:
    value, symbols = node_meta.val(node), node_meta.symbols(node)
    if not isinstance(value, torch.Tensor):
        return ""
    dims = symbols if symbols and len(symbols) == value.dim() else ("",) * value.dim()
    sizes = ", ".join(s or str(n) for n, s in zip(value.shape, dims, strict=True))
    return f"{_SHORT.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{sizes}]"


def _value(value: Any) -> str:
    if isinstance(value, torch.fx.Node):
        return value.name
    if isinstance(value, (tuple, list)):
        inner = ", ".join(_value(v) for v in value)
        return f"({inner}{',' if len(value) == 1 else ''})" if isinstance(value, tuple) else f"[{inner}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        parts = ["" if v is None else _value(v) for v in (value.start, value.stop)]
        return ":".join(parts) + (f":{_value(value.step)}" if value.step is not None else "")
    if value is Ellipsis:
        return "..."
    return repr(value)
