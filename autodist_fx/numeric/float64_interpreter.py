"""Runs a graph in float64, whatever dtypes it was traced in, on weights that are drawn by name."""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.fx import Node

from autodist_fx.numeric.factored import draw, sliced
from passes.fx.arguments import fetch
from passes.ops.buffers import write_buffers
from passes.program.rank_program import RankProgram

_WIDER = {
    torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}  # fmt: skip
_CASTS = ("float", "half", "bfloat16")
FEW_ELEMENTS = 2**24  # a model with no more parameters has full matrices: 128 MiB of float64
_SMALL = 2**16  # a weight with no more elements is a full matrix in every model


class Weights:
    """The whole model's parameters and buffers in float64, by name,
    each drawn on first use. Equal seeds give equal weights."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], buffers: Mapping[str, torch.Tensor], seed: int) -> None:
        """Take the shapes of parameters, and the buffers, which keep values of their own unless they are on meta."""
        self._shapes, self._buffers, self._seed = shapes, buffers, seed
        self.are_few = sum(math.prod(shape) for shape in shapes.values()) <= FEW_ELEMENTS
        self._made: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._made:
            buffer = self._buffers.get(name)
            self._made[name] = self._draw(name) if buffer is None or buffer.is_meta else _wide(buffer)
        return self._made[name]

    def _draw(self, name: str) -> torch.Tensor:
        """Draw one tensor: matrices with variance 1 / shape[-1], so that softmaxes do not saturate; vectors (norm
        scales, biases) about 1. A large matrix of a large model is Factored."""
        shape = self._shapes[name] if name in self._shapes else tuple(self._buffers[name].shape)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        if len(shape) > 1 and not self.are_few and math.prod(shape) > _SMALL:
            return draw(shape, generator)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return noise * shape[-1] ** -0.5 if len(shape) > 1 else 1 + 0.3 * noise


def _wide(value: Any) -> Any:
    """Convert tensors and dtypes of lower precision to float64 (complex128), also inside tuples, lists and dicts."""
    if isinstance(value, torch.dtype):
        return _WIDER.get(value, value)
    if isinstance(value, torch.Tensor):
        return value.to(_WIDER[value.dtype]) if value.dtype in _WIDER else value
    if isinstance(value, (tuple, list)):
        return type(value)(_wide(v) for v in value)
    if isinstance(value, dict):
        return {k: _wide(v) for k, v in value.items()}
    return value


class Doubles(torch.fx.Interpreter):
    """An fx Interpreter that computes in float64.

    `tensor_at(path)` returns the float64 tensor of a parameter or buffer, or None for a constant of the graph's own.
    """

    def __init__(
        self, module: torch.fx.GraphModule, tensor_at: Callable[[str], torch.Tensor | None], keep: bool = False
    ) -> None:
        super().__init__(module, garbage_collect_values=not keep)
        self.extra_traceback = False
        self._tensor_at = tensor_at

    def values(self, inputs: Mapping[str, Any]) -> Any:
        """Run the graph on inputs by name, and return its output."""
        names = [str(node.target) for node in self.module.graph.nodes if node.op == "placeholder"]
        return self.run(*(inputs.get(name) for name in names))

    def fetch_args_kwargs_from_env(self, n: Node) -> Any:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _wide_dtypes(args), _wide_dtypes(kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        own = self._tensor_at(str(target))
        return _wide(fetch(self.module, str(target))) if own is None else own

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is write_buffers:
            return tuple(args[0])  # the new values; nothing is written, since the compared graphs share the buffers
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_method("double" if target in _CASTS else target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        state = {}
        for name, tensor in _tensors(module):
            own = self._tensor_at(f"{target}.{name}")
            state[name] = _wide(tensor) if own is None else own
        return torch.func.functional_call(module, state, args, kwargs) if state else module(*args, **kwargs)


def _wide_dtypes(value: Any) -> Any:
    """Replace dtypes of lower precision by float64 in an op's arguments; tensors stay as they are."""
    if isinstance(value, torch.dtype):
        return _WIDER.get(value, value)
    if type(value) in (tuple, list):
        return type(value)(_wide_dtypes(v) for v in value)
    if isinstance(value, dict):
        return {k: _wide_dtypes(v) for k, v in value.items()}
    return value


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def of_whole(module: torch.fx.GraphModule, names: Mapping[int, str], weights: Weights) -> Callable[[str], Any]:
    """Return `tensor_at` for the model's own graph; `names` comes from passes.op_graph.build.parameter_names."""

    def tensor_at(path: str) -> torch.Tensor | None:
        name = names.get(id(fetch(module, path)))
        return None if name is None else weights[name]

    return tensor_at


def of_rank(program: RankProgram, weights: Weights) -> Callable[[str], Any]:
    """Return `tensor_at` for a rank's graph: the rank's slices of the whole weights."""
    made: dict[str, torch.Tensor] = {}

    def tensor_at(path: str) -> torch.Tensor | None:
        shard = program.param_shards.get(path)
        if shard is None:
            return None
        if path not in made:
            tensor = weights[shard.source]
            made[path] = tensor if shard.dim is None else sliced(tensor, shard.dim, shard.intervals)
        return made[path]

    return tensor_at


@contextlib.contextmanager
def double_by_default() -> Iterator[None]:
    """Make float64 torch's default dtype inside the `with`, for tensors that a graph creates without a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
