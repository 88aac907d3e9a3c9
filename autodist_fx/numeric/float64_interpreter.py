"""Runs a graph in float64, whatever it was traced in, on weights that are drawn by their names."""

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
FEW_ELEMENTS = 2**24  # of all weights that may be full matrices: 128 MiB
_SMALL = 2**16  # of one that always is


class Weights:
    """The whole model's parameters and buffers in float64, by name; made when asked for. Equal for equal seeds."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], buffers: Mapping[str, torch.Tensor], seed: int) -> None:
        """`shapes` are the parameters', `buffers` what has values of its own."""
        self._shapes, self._buffers, self._seed = shapes, buffers, seed
        self.are_few = sum(math.prod(shape) for shape in shapes.values()) <= FEW_ELEMENTS
        self._made: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._made:
            buffer = self._buffers.get(name)
            self._made[name] = self._draw(name) if buffer is None or buffer.is_meta else _wide(buffer)
        return self._made[name]

    def _draw(self, name: str) -> torch.Tensor:
        """None too large for softmaxes to stay soft; vectors (scales of norms, biases) about 1."""
        shape = self._shapes[name] if name in self._shapes else tuple(self._buffers[name].shape)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        if len(shape) > 1 and not self.are_few and math.prod(shape) > _SMALL:
            return draw(shape, generator)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return noise * shape[-1] ** -0.5 if len(shape) > 1 else 1 + 0.3 * noise


def _wide(value: Any) -> Any:
    """Tensors and dtypes of few digits become float64, wherever they are."""
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
    """`tensor_at(path)` gives the float64 tensor of a parameter or buffer, None for a constant of the graph's own."""

    def __init__(
        self, module: torch.fx.GraphModule, tensor_at: Callable[[str], torch.Tensor | None], keep: bool = False
    ) -> None:
        super().__init__(module, garbage_collect_values=not keep)
        self.extra_traceback = False
        self._tensor_at = tensor_at

    def values(self, inputs: Mapping[str, Any]) -> Any:
        """The graph's output for inputs by name."""
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
            return tuple(args[0])  # into tensors that the graphs which are compared have in common: left as they are
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
    """`tensor_at` of the model's own graph; `names` as passes.op_graph.build.parameter_names has them."""

    def tensor_at(path: str) -> torch.Tensor | None:
        name = names.get(id(fetch(module, path)))
        return None if name is None else weights[name]

    return tensor_at


def of_rank(program: RankProgram, weights: Weights) -> Callable[[str], Any]:
    """`tensor_at` of a rank's graph: its slices."""
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
    """Tensors that a graph makes without a dtype are float64, too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
