"""A symbolic tracer over torch.fx.Tracer, whose proxies know what they stand for at one set of example sizes.

It stands where transformers 4.57 has `utils.fx`, which 5 no longer ships. Every node is run once on meta tensors as it
is made, so that Python may ask a proxy for its rank, its dtype or its truth; what cannot be run is noted on the tracer
(`first_failure`), and an error only where Python asks for it.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from passes.fx.meta_calls import MetaCalls

_current: SymbolicTracer | None = None


class SymbolicProxy(Proxy):
    """A proxy that may know its value at the example sizes (`_metadata`: a meta tensor, a number, a cache, ...)."""

    def install_metadata(self, metadata: Any) -> None:
        self._metadata = metadata

    @property
    def shape(self) -> Any:
        return self.tracer.create_proxy("call_method", "size", (self,), {})

    @property
    def device(self) -> Any:
        return DeviceAttribute(self, "device")  # a node of the graph: where it will run is not known yet

    @property
    def dtype(self) -> Any:
        known = self.__dict__.get("_metadata")
        return known.dtype if isinstance(known, torch.Tensor) else AttributeProxy(self, "dtype")

    def __len__(self) -> int:
        known = self.__dict__.get("_metadata")
        return super().__len__() if known is None else len(known)

    def __bool__(self) -> bool:
        known = self.__dict__.get("_metadata")
        return super().__bool__() if known is None else known

    def __getattr__(self, name: str) -> Any:
        if name == "_metadata":
            return self.__getattribute__(name)
        return AttributeProxy(self, name)

    def __setitem__(self, index: Any, value: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __contains__(self, item: Any) -> bool:
        known = self.__dict__.get("_metadata")
        return any(item is value or item == value for value in self) if known is None else item in known


class AttributeProxy(SymbolicProxy):
    """A proxy of `x.name`: a method that is about to be called, or an attribute, whose node is made when something
    reads it."""

    def __init__(self, root: Any, attr: str) -> None:
        self.root, self.attr, self.tracer = root, attr, root.tracer
        self._node: Node | None = None
        known = root.__dict__.get("_metadata")
        if known is not None:
            self.install_metadata(getattr(known, attr))

    @property
    def node(self) -> Node:  # type: ignore[override]  # as torch.fx.proxy.Attribute does
        if self._node is None:
            self._node = self.tracer.create_proxy("call_function", builtins.getattr, (self.root, self.attr), {}).node
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


class DeviceAttribute(AttributeProxy):
    """The device of a proxy: "meta" wherever a node is run for its example."""


def _to_meta(value: Any) -> Any:
    """Return an argument of a node as it is run for its example."""
    if isinstance(value, torch.Tensor):
        return value.to("meta")  # a constant; torch mixes meta with no other device
    if isinstance(value, DeviceAttribute):
        return torch.device("meta")
    if isinstance(value, Proxy):
        if "_metadata" not in value.__dict__:
            raise RuntimeError(f"nothing is known of {value.node}")
        return value._metadata
    return value


# -- what torch cannot run on meta tensors ----------------------------------------------------------------------------


def _repeat_interleave(
    x: torch.Tensor, repeats: Any, dim: int | None = None, *, output_size: int | None = None
) -> torch.Tensor:
    shape = list(x.shape) if dim is not None else [x.numel()]
    at = dim or 0
    shape[at] = output_size if output_size is not None else shape[at] * int(repeats)
    return x.new_empty(shape)


def _masked_item(x: Any, index: Any) -> Any:
    """Return x[mask], all of which is taken: the example of a size that depends on values."""

    def on_cpu(value: Any) -> Any:
        return torch.ones_like(value, device="cpu") if isinstance(value, torch.Tensor) else value

    if not isinstance(x, torch.Tensor):
        return x[index]
    items = tuple(map(on_cpu, index)) if isinstance(index, tuple) else on_cpu(index)
    return torch.empty_like(x, device="cpu")[items].to("meta")


def _attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
    """Return a tensor of attention's shape where the mask does not go with it: the graph is refused later, when it runs
    on its examples."""
    return q.new_empty(*q.shape[:-1], v.shape[-1])


_OTHERWISE: dict[Any, Callable[..., Any]] = {
    torch.nn.functional.scaled_dot_product_attention: _attended,
    torch.repeat_interleave: _repeat_interleave,
    torch.Tensor.repeat_interleave: _repeat_interleave,
    operator.getitem: _masked_item,
}


def _run(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    try:
        return target(*args, **kwargs)
    except Exception:
        if target in _OTHERWISE:
            return _OTHERWISE[target](*args, **kwargs)
        raise


# -- the tracer -------------------------------------------------------------------------------------------------------


def _traced_where_proxied(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a node of torch.arange(n, device=d) and the like where they get a proxy for a number, which they do not
    take."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        found: list[Proxy] = []
        map_aggregate((args, kwargs), lambda a: found.append(a) if isinstance(a, Proxy) else None)
        if not found or _current is None:
            return function(*args, **kwargs)
        return found[0].tracer.create_proxy("call_function", function, args, kwargs)

    return wrapper


class SymbolicTracer(Tracer):
    """Runs a model's Python with proxies for its inputs. A subclass says what is a leaf, and keeps `first_failure`."""

    _TORCH_METHODS_TO_PATCH = (
        "arange", "zeros", "ones", "full", "full_like", "eye", "empty", "tensor", "clamp", "finfo", "tril", "triu",
        "linspace", "zeros_like", "ones_like", "empty_like", "where",
    )  # fmt: skip
    proxy_buffer_attributes = True
    first_failure: str | None = None

    def __init__(self, autowrap_modules: tuple[Any, ...] = (math,), autowrap_functions: tuple[Any, ...] = ()) -> None:
        super().__init__(autowrap_modules=autowrap_modules, autowrap_functions=autowrap_functions)
        self._calls = MetaCalls()

    def proxy(self, node: Node) -> SymbolicProxy:
        return SymbolicProxy(node, self)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None,
        proxy_factory_fn: Any = None,
    ) -> Any:  # fmt: skip
        made = super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)
        if kind == "placeholder":
            if target in self.meta_args:
                made.install_metadata(self.meta_args[target])
            return made
        if kind == "output":
            return made
        before = {flag: getattr(self, flag, False) for flag in ("_disable_module_getattr", "_disable_call_module")}
        self._disable_module_getattr = self._disable_call_module = True
        try:
            if kind == "call_function" and target in self.constructors and "device" in kwargs:
                kwargs = {**kwargs, "device": torch.device("meta")}
            made.install_metadata(self._example(kind, target, *map_aggregate((args, kwargs), _to_meta)))
        except Exception as error:
            if self.first_failure is None:
                self.first_failure = f"{kind} {target}: {type(error).__name__}: {error}"
        finally:
            for flag, value in before.items():
                setattr(self, flag, value)
        return made

    def _example(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "call_function":
            found = self._calls(target, args, kwargs, _run)
            return found.to("meta") if isinstance(found, torch.Tensor) else found
        if kind == "call_method":
            return self._calls(getattr(type(args[0]), target), args, kwargs, _run)
        if kind == "call_module":
            return self.orig_forward(*args, **kwargs)
        value: Any = self.root
        for atom in target.split("."):
            value = getattr(value, atom)
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if getattr(self, "_disable_call_module", False):
            return forward(*args, **kwargs)
        self.orig_forward = forward
        return super().call_module(m, forward, args, kwargs)

    def path_of_module(self, mod: nn.Module) -> str:
        """Return the module's path; a module that forward makes for itself (an activation) is added to the root."""
        try:
            return super().path_of_module(mod)
        except NameError:
            if next(mod.parameters(), None) is not None or next(mod.buffers(), None) is not None:
                raise
            if _holds_proxies(mod):
                return ""
            number, stem = 0, type(mod).__name__.lower()
            while getattr(self.root, f"{stem}_{number}", mod) is not mod:
                number += 1
            if not hasattr(self.root, f"{stem}_{number}"):
                self.root.add_module(f"{stem}_{number}", mod)
            return f"{stem}_{number}"

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not _holds_proxies(m) and super().is_leaf_module(m, module_qualified_name)

    def keys(self, obj: Proxy) -> Any:
        """Return the names in `f(**proxy)`: of forward's own **kwargs, there are none."""
        found = AttributeProxy(obj, "keys")()
        return found._metadata if str(obj.node.target).startswith("**") else found

    @contextlib.contextmanager
    def patch_for_tracing(self, root: Any) -> Iterator[None]:
        before = {name: getattr(torch, name) for name in self._TORCH_METHODS_TO_PATCH}
        self.constructors = set(before.values())
        for name, function in before.items():
            setattr(torch, name, _traced_where_proxied(function))
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(torch, name, function)

    def trace(
        self, root: nn.Module, concrete_args: dict[str, Any] | None = None, dummy_inputs: dict[str, Any] | None = None,
        complete_concrete_args_with_inputs_not_in_dummy_inputs: bool = False,
    ) -> Graph:  # fmt: skip
        """Trace a graph of `root` with `dummy_inputs` as examples. `concrete_args` are no inputs of it. (The last
        argument is HFTracer's: all that has no example has to be in `concrete_args` here.)"""
        global _current
        parameters = inspect.signature(root.forward).parameters
        concrete_args = dict(concrete_args or {})
        names = parameters.keys() - concrete_args.keys()

        def to_meta(value: Any) -> Any:
            return value.to("meta") if isinstance(value, torch.Tensor) else value

        self.meta_args = {k: pytree.tree_map(to_meta, v) for k, v in (dummy_inputs or {}).items()}
        self.meta_args |= {f"**{p.name}": {} for p in parameters.values() if p.kind is p.VAR_KEYWORD}
        _current = self
        try:
            with self.patch_for_tracing(root):
                self.graph = super().trace(root, concrete_args=concrete_args)
        finally:
            _current = None
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and node.target in names:
                node.args = ()  # no default
            elif node.op == "placeholder":  # of a concrete argument: it and fx's assertion on it
                _erase_with_users(self.graph, node)
            elif node.op == "output":
                node.type = None
        return self.graph


def _erase_with_users(graph: Graph, node: Node) -> None:
    for user in list(node.users):
        _erase_with_users(graph, user)
    graph.erase_node(node)


def _holds_proxies(module: nn.Module) -> bool:
    return any(isinstance(value, Proxy) for value in vars(module).values())


def get_concrete_args(model: nn.Module, input_names: list[str]) -> dict[str, Any]:
    """Return the defaults of all arguments of forward that are no inputs, by name."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in input_names}


def patch_base(patch: Callable[[Any, str, Any], None]) -> None:
    """Mend nothing: this tracer is ours (see hf_tracer.patch_base)."""


__all__ = [
    "AttributeProxy", "DeviceAttribute", "SymbolicProxy", "SymbolicTracer", "get_concrete_args", "patch_base",
]  # fmt: skip
