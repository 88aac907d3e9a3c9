"""Runs one node of a rank's graph on meta tensors of the rank's own shapes, to see whether its arguments fit them."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import nn
from torch.fx import Node

from passes.fx.arguments import submodule
from passes.ops.parallel_layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from passes.program.rank_program import RankProgram

Known = dict[Node, Any]  # per node a `Tensor`, a tuple of such, or a plain value
# Two of these behave alike when their text and their tensors' shapes do.
_ALIKE = (
    ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, nn.Linear, nn.Embedding, nn.LayerNorm, nn.SiLU,
    nn.GELU, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Dropout, nn.Identity,
)  # fmt: skip


class Tensor(tuple):
    """The (shape, dtype) of a tensor, to be told from a plain tuple."""

    __slots__ = ()

    def __repr__(self) -> str:
        shape, dtype = self
        return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


class MetaRunner:
    """Runs nodes on the meta device; equal calls (the layers of a model, its ranks) run once."""

    def __init__(self) -> None:
        self._results: dict[Any, Any] = {}
        self._modules: dict[int, nn.Module] = {}  # keeps them alive: their ids are keys

    def run(self, program: RankProgram, node: Node, known: Known) -> Any:
        """Returns a node's result as `Tensor`s and numbers; raises what the op raises."""
        module = submodule(program.graph_module, str(node.target)) if node.op == "call_module" else None
        called = node.target if module is None else self._module_key(program, str(node.target), module)
        key = (node.op, called, _key(node.args, known), _key(node.kwargs, known))
        if key not in self._results:
            args, kwargs = _values(node.args, known), _values(node.kwargs, known)
            with torch.no_grad():
                if module is not None:
                    result = torch.func.functional_call(
                        module, _meta_state(program, str(node.target), module), args, kwargs
                    )
                elif node.op == "call_method":
                    result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    result = node.target(*args, **kwargs)
            self._results[key] = _types(result)
        return self._results[key]

    def _module_key(self, program: RankProgram, target: str, module: nn.Module) -> Any:
        if type(module) not in _ALIKE:
            self._modules[id(module)] = module
            return id(module)
        state = tuple(
            (name, program.param_shards[f"{target}.{name}"].local_shape)
            for name, _ in module.named_parameters(remove_duplicate=False)
        )
        return type(module), module.extra_repr(), getattr(module, "transposed", None), state


def _meta_state(program: RankProgram, target: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the module's tensors on meta, in the dtypes that they were traced in."""
    state = {}
    for named in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            shard = program.param_shards.get(f"{target}.{name}")
            dtype = tensor.dtype if shard is None else getattr(torch, shard.dtype)
            state[name] = torch.empty(tensor.shape, dtype=dtype, device="meta")
    return state


def _key(value: Any, known: Known) -> Any:
    """Returns a key that is hashable, and equal for arguments that give equal results."""
    if isinstance(value, Node):
        own = known[value]
        return own if isinstance(own, Tensor) else _key(own, known)
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *(_key(v, known) for v in value))
    if isinstance(value, dict):
        return ("dict", *((k, _key(v, known)) for k, v in value.items()))
    if isinstance(value, slice):
        return ("slice", _key(value.start, known), _key(value.stop, known), _key(value.step, known))
    return type(value), value  # 1, 1.0 and True are equal in Python and different to torch


def _values(value: Any, known: Known) -> Any:
    if isinstance(value, Node):
        return _values(known[value], known)
    if isinstance(value, Tensor):
        return torch.empty(value[0], dtype=value[1], device="meta")
    if isinstance(value, (tuple, list)):
        return type(value)(_values(v, known) for v in value)
    if isinstance(value, dict):
        return {k: _values(v, known) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(*(_values(v, known) for v in (value.start, value.stop, value.step)))
    return value


def _types(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Tensor((tuple(value.shape), value.dtype))
    if isinstance(value, (tuple, list)) and any(isinstance(v, torch.Tensor) for v in value):
        return tuple(_types(v) for v in value)
    return value
