"""Traces a model's Python: the version's symbolic tracer, mended for current models and linear in the number of
layers."""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import NoneType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.fx import Proxy
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from transformers import Cache
from transformers.pytorch_utils import Conv1D
from transformers.utils import ModelOutput

from autodist_fx.calls.value_guards import ValueGuard
from autodist_fx.errors import TracingError
from autodist_fx.tracing.control_flow.conditions import lengths_for_tensors
from autodist_fx.tracing.control_flow.constants import OtherExample, check_fill, constant_or_none, within_range
from autodist_fx.tracing.control_flow.data_dependent import rewritten, unrolled
from autodist_fx.tracing.control_flow.experts import experts_forward
from autodist_fx.tracing.control_flow.random_calls import drawn_in_graph
from autodist_fx.tracing.control_flow.value_branches import Answers, trace_both_ways
from autodist_fx.tracing.encoder_decoder_cache import PARTS
from autodist_fx.tracing.gradient_regions import GradientRegions
from autodist_fx.tracing.hooks import has_attached, of_another_class, refuse_autocast, restore_attributes, traced_for
from autodist_fx.tracing.passing_cache import PassingCache
from autodist_fx.tracing.recurrent_states import is_container
from autodist_fx.tracing.versions.forwards import as_before
from autodist_fx.tracing.versions.tracer_base import AttributeProxy, SymbolicProxy, SymbolicTracer
from passes.fx import node_meta

_MOST_ROWS = 1024  # of a tensor that Python runs over, each of which has nodes of its own
_DTYPES = {int: torch.int64, float: torch.float64, bool: torch.bool}  # as which torch takes these types of Python
_TAKE_SIZES = ("full", "zeros", "ones", "empty", "arange", "clamp")

_OF_SIZES = ("split", "split_with_sizes", "view", "reshape", "expand", "unfold", "narrow")


class Keywords(dict[str, Any]):
    """The `**kwargs` of the traced forward. A class of its own, because fx flattens a plain dict into inputs."""


class _OneArgument(list[Any]):
    """A list that forward takes. A class of its own, because fx flattens a plain list into inputs."""


class CacheLayerProxy:
    """A layer of a CacheProxy: its kind is known now, how much it holds when the graph runs."""

    _FIXED = frozenset({"is_sliding", "is_compileable", "sliding_window"})

    def __init__(self, cache: CacheProxy, index: int) -> None:
        self._cache, self._index, self._example = cache, index, cache._metadata.layers[index]

    @property
    def is_initialized(self) -> Any:
        """Return whether a call has written it; never, where none of this model does."""
        return self._example.is_initialized and self.get_seq_length() > 0

    @property
    def keys(self) -> CachedTensor:
        """Return its keys, of which a model may ask how many there are."""
        return CachedTensor(self, "keys")

    @property
    def values(self) -> CachedTensor:
        """Return its values, see `keys`."""
        return CachedTensor(self, "values")

    def get_seq_length(self) -> Any:
        """Return the number of tokens that it holds."""
        return self._cache.get_seq_length(self._index)

    def get_mask_sizes(self, tokens: Any) -> Any:
        """Return (keys that `tokens` more attend to, the first one's position)."""
        return self._cache.get_mask_sizes(tokens, self._index)

    def __getattr__(self, name: str) -> Any:
        if name in self._FIXED:
            return getattr(self._example, name)
        raise self.refusal(name)

    def refusal(self, name: str) -> TracingError:
        """Return the error for a part of the layer that no graph has."""
        return TracingError(
            f"it reads {name} of layer {self._index} of its cache, and a graph has keys and values from the cache's "
            "update alone: trace with use_cache=False"
        )


class CachedTensor:
    """The keys or values of a CacheLayerProxy, which only the cache's update gives."""

    def __init__(self, layer: CacheLayerProxy, name: str) -> None:
        self._layer, self._name = layer, name

    def numel(self) -> Any:
        """Return the number of elements [batch, heads, tokens, size]."""
        example = getattr(self._layer._example, self._name)
        if self._layer.is_sliding or example is None:
            raise self._layer.refusal(f"{self._name}.numel")
        tracer = self._layer._cache.tracer
        first = next(n for n in tracer.graph.nodes if isinstance(tracer.examples_of.get(n), torch.Tensor))
        given = tracer.proxy(first)
        given.install_metadata(tracer.examples_of[first])
        return given.shape[0] * self._layer.get_seq_length() * (example.shape[1] * example.shape[3])

    def __getattr__(self, name: str) -> Any:
        raise self._layer.refusal(f"{self._name}.{name}")


class CacheProxy(SymbolicProxy):
    """A proxy of the KV cache that the graph takes as an input; `isinstance(proxy, Cache)` holds."""

    # The layout of the cache is the model's, not the call's: known now, and no business of the graph. So is whether a
    # cross-attention has written its layer yet: it has not.
    _FIXED = frozenset({"is_sliding", "is_compileable", "is_updated", "is_linear", "is_dummy", "is_initialized"})

    @property  # type: ignore[misc]  # object's can be written; nobody writes a proxy's
    def __class__(self) -> type:
        """Return the class that isinstance asks for."""
        return type(self._metadata) if "_metadata" in self.__dict__ else CacheProxy

    def __getattr__(self, name: str) -> Any:
        if name in self._FIXED:
            return getattr(self._metadata, name)
        if name == "get_query_offset":  # 5's question for the position of the next token
            return self.get_seq_length
        if name == "layers":
            return tuple(CacheLayerProxy(self, index) for index in range(len(self._metadata.layers)))
        if name in PARTS:
            return self.tracer.create_proxy(
                "call_function", getattr, (self, name), {}, proxy_factory_fn=lambda node: CacheProxy(node, self.tracer)
            )
        return super().__getattr__(name)

    def __bool__(self) -> bool:
        return True  # `if past_key_values`: there is one

    def update(self, keys: Any, values: Any, layer_idx: Any, *more: Any, **kwargs: Any) -> Any:
        """Make a node `update(keys, values, layer[, cache_kwargs])`; 5 hands on more, for caches of other kinds."""
        more = tuple(m for m in more if m is not None)
        if not kwargs or "cache_kwargs" in kwargs:
            return AttributeProxy(self, "update")(keys, values, layer_idx, *more, **kwargs)
        return AttributeProxy(self, "update")(keys, values, layer_idx)


class Tracer(SymbolicTracer):
    """Traces one model with given example inputs.

    Each node gets `meta["nn_module_stack"]` (qualified path -> (path, class), outermost first) and `meta["source"]`
    ("modeling_llama.py:241"), the line of the model's own code that made it.
    """

    # A cache that the model makes for itself is Python's business, and its tensors the graph's.
    _CLASSES_TO_PATCH: ClassVar[dict[type, type]] = {}

    def __init__(
        self,
        model: nn.Module,
        examples: dict[str, object],
        other_examples: dict[str, object] | None = None,
        keywords: Mapping[str, object] | None = None,
        values: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """`other_examples` are inputs of other sizes, which tell lengths from constants (see constants.py); `keywords`
        goes into forward's **kwargs; `values` are those of a call, by which conditions on them are decided."""
        super().__init__()
        self.examples = examples
        self.other_example = OtherExample(self, other_examples or {})
        self.keywords = Keywords(keywords or {})
        self.values = values or {}
        self.value_guards: list[ValueGuard] = []  # of the conditions that were decided by them
        self.source_files = model_source_files(model)
        self.constant_dims: set[tuple[Any, ...]] = set()  # where bounds were found to be of no length (fixed_bounds.py)
        self.data_dependent_calls = 0  # how many lengths were made up so far (see data_dependent.py)
        self.written_in_place: list[tuple[torch.fx.Node, torch.fx.Node]] = []  # (a tensor, what it became)
        self.whole_of_split: dict[torch.fx.Node, Any] = {}  # split_rows -> what it splits
        self.runs: dict[tuple[torch.fx.Node, torch.fx.Node], Any] = {}  # (rows, counts) -> split_rows of them
        self.first_failure: str | None = None  # why the first value that could not be computed on meta could not
        self.first_unknown: torch.fx.Node | None = None  # the node of that value
        self.examples_of: dict[torch.fx.Node, Any] = {}  # what each node is with the example inputs, where known
        self.objects: dict[str, Callable[[Tracer], Any]] = {}  # arguments of forward that hold proxies, and how to make
        self.at_start: Callable[[], None] | None = None  # called when the inputs are there
        self.phase = ""  # "prompt": cache positions count from 0; "step": there is one, past the first; "": unknown
        self.final_cache: Any = None  # the cache that forward returned or else was given, where it is no input
        self.final_cache_name = ""
        self.answers: Answers | None = None  # to conditions on values, where both branches are traced
        self.kept_buffers: dict[tuple[nn.Module, str], Any] = {}  # (module, attribute) -> what calls leave there
        self.buffer_writes = 0  # so many write_buffers were traced
        self.left_by_calls: set[str] = set()  # paths of attributes and buffers that depend on the calls before
        self.gradient_regions = GradientRegions(model, examples)
        # HFTracer searches these lists at each access, which makes a trace quadratic in the number of layers.
        tensors = [*model.named_buffers(), *model.named_parameters()]
        self._names = {id(tensor): name for name, tensor in tensors}
        self._devices = {name: tensor.device for name, tensor in tensors}
        self._copies: dict[nn.Module, nn.Module] = {}  # the caller's modules, which a hook may hold -> those traced
        original = traced_for(model)
        if original is not None:
            tensors = [*original.named_buffers(), *original.named_parameters()]
            self._names |= {id(tensor): name for name, tensor in tensors}
            self._copies = {module: model.get_submodule(path) for path, module in original.named_modules()}
        self._thread = threading.get_ident()  # fx patches nn.Module for all threads

    @contextlib.contextmanager
    def patch_for_tracing(self, root: Any) -> Iterator[None]:
        patches = super().patch_for_tracing(root)
        patches.__enter__()
        try:
            with drawn_in_graph(self):
                yield
        finally:
            patches.__exit__(None, None, None)  # 4.57's HFTracer restores only if it is not told of an error

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Identity):
            return False  # it gives back what it gets, which need not be a tensor: None stays None
        if is_parametrized(m) or isinstance(m, ParametrizationList) or type(m).__module__ == parametrizations.__name__:
            return False  # its weight is computed of others (weight_norm): the graph computes it, too
        if any(isinstance(vars(m).get(name), torch.Tensor) for name in ("weight", "bias")):
            return False  # no parameter, but a tensor that the graph holds, or computes
        if isinstance(m, Conv1D):
            return not has_attached(m)
        is_torchs = super().is_leaf_module(m, module_qualified_name)
        return is_torchs and not has_attached(m) and not of_another_class(m)

    def _proxy_placeholder(self, name: str, concrete_args: dict[str, Any] | None, *more: Any) -> Any:
        if name.startswith("**"):
            return self.keywords
        if name in self.objects:
            made = self.objects[name](self)
            self.final_cache, self.final_cache_name = _OneArgument(made) if type(made) is list else made, name
            return self.final_cache
        if concrete_args is not None and name in concrete_args:
            value = concrete_args[name]
            if isinstance(value, (int, float, str, torch.Tensor, PassingCache, NoneType)):
                return value  # fx makes an input of it, with an assertion, and HFTracer removes both again
        return super()._proxy_placeholder(name, concrete_args, *more)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)  # a model that runs meanwhile
        if m in self._copies:
            m = self._copies[m]
            return m(*args, **kwargs)
        computing_shapes = getattr(self, "_disable_call_module", False)
        if m._buffers and not computing_shapes and self.is_leaf_module(m, ""):
            return super().call_module(m, _with_meta_buffers(m), args, kwargs)
        if computing_shapes or self.is_leaf_module(m, ""):
            return super().call_module(m, forward, args, kwargs)
        forward = experts_forward(self, m, args, kwargs) or forward
        if type(m).train is not nn.Module.train:
            m.train(m.training)  # some make a table of their parameters when they are told so: the graph makes it, too
        found = trace_both_ways(self, m, functools.partial(super().call_module, m, forward, args, kwargs))
        restore_attributes(m)
        return found

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        created = super().create_args_for_root(*args, **kwargs)
        if self.at_start is not None:
            self.at_start()
        return created

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, PassingCache):
            return None  # the model returns it, and there is nothing in it
        if isinstance(a, ModelOutput):
            a = as_before(a)
            for name, value in list(a.items()) if self.phase else ():
                if is_container(value) and not isinstance(value, (tuple, dict)) and not isinstance(value, Proxy):
                    self.final_cache, self.final_cache_name = a.pop(name), name
        if isinstance(a, type) and a in _DTYPES:
            return _DTYPES[a]
        # numpy's numbers pass for Python's but are written "np.float64(0.5)", a name that no graph knows
        return super().create_arg(a.item() if isinstance(a, np.generic) else a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **named: Any) -> Any:
        instead = rewritten(self, kind, target, args, kwargs)
        if instead is not None:
            return instead
        example = self.examples.get(target) if kind == "placeholder" else None
        if isinstance(example, Cache):
            named["proxy_factory_fn"] = lambda node: CacheProxy(node, self)
        if kind == "call_function" and getattr(target, "__name__", "") in _TAKE_SIZES:
            args, kwargs = lengths_for_tensors(args), {k: lengths_for_tensors(v) for k, v in kwargs.items()}
            args = within_range(args, kwargs.get("dtype")) if target.__name__ == "full" else args
        if kind == "call_method" and target == "fill_":
            check_fill(*args, **kwargs)
        if (target if kind == "call_method" else getattr(target, "__name__", "")) in _OF_SIZES:
            args = (*args[:1], *lengths_for_tensors(args[1:]))  # x.split([torch.tensor(length), ...])
        if kind == "call_function" and target is operator.getitem and len(args) == 2:
            args = (args[0], lengths_for_tensors(args[1]))  # x[: torch.tensor(length)]
        if kind == "call_method" and target == "requires_grad_":
            return args[0]  # enable_input_require_grads(): what gradients parameters get is the same without
        if kind == "call_method" and target == "to" and self._is_there(*args, **kwargs):
            return args[0]
        proxy = super().create_proxy(kind, target, args, kwargs, *more, **named)
        if example is not None:
            proxy.install_metadata(example)  # HFTracer's own went through a pytree, which may rebuild a cache
        elif self.first_failure is not None and self.first_unknown is None:
            self.first_unknown = proxy.node
        if getattr(proxy, "_metadata", None) is not None:
            self.examples_of[proxy.node] = proxy._metadata
            node_meta.set_traced_as_tensor(proxy.node, isinstance(proxy._metadata, torch.Tensor))
        if self.gradient_regions.ends_in(proxy.node, getattr(proxy, "_metadata", None)):
            return self.create_proxy("call_method", "detach", (proxy,), {})
        return proxy

    def _is_there(self, value: Proxy, device: Any = None, *others: Any, **more: Any) -> bool:
        """Return whether `value` is a parameter or buffer, and `device` the one that it is on."""
        if others or more or not isinstance(device, torch.device) or value.node.op != "get_attr":
            return False
        return self._devices.get(str(value.node.target)) == device

    def create_node(self, *args: Any, **kwargs: Any) -> torch.fx.Node:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            refuse_autocast()
        node = super().create_node(*args, **kwargs)
        node_meta.set_source(node, self._source())
        node_meta.set_module_stack(node, node_meta.module_stack(node))  # fx leaves it out in the root's own forward
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return a proxy for a parameter or buffer, the same one at each access; anything else as it is."""
        if not isinstance(attr_val, torch.Tensor) or getattr(self, "_disable_module_getattr", False):
            return attr_val
        if threading.get_ident() != self._thread:
            return attr_val
        name = self._names.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def iter(self, obj: Any) -> Iterator[Any]:
        known = getattr(obj, "_metadata", None)
        if isinstance(known, (tuple, list)):  # (*input_shape, -1, head_dim)
            return iter([obj[index] for index in range(len(known))])
        loop = unrolled(self, obj)
        if loop is None and isinstance(known, torch.Tensor) and known.dim() and len(known) <= _MOST_ROWS:
            rows = constant_or_none(self.create_proxy("call_method", "size", (obj, 0), {}))
            loop = None if rows is None else iter([obj[index] for index in range(rows)])  # as many for all inputs
        return super().iter(obj) if loop is None else loop

    def _source(self) -> str | None:
        frame = sys._getframe(2)
        while frame is not None:
            name = self.source_files.get(frame.f_code.co_filename)
            if name is not None:
                return f"{name}:{frame.f_lineno}"
            frame = frame.f_back  # type: ignore[assignment]
        return None


def _with_meta_buffers(module: nn.Module) -> Callable[..., Any]:
    """Return the module's forward for meta inputs: buffers are real, and torch does not mix the two."""
    buffers = {name: buffer.to("meta") for name, buffer in module.named_buffers()}
    return lambda *args, **kwargs: torch.func.functional_call(module, buffers, args, kwargs)


def model_source_files(model: nn.Module) -> dict[str, str]:
    """Return {path: file name} of the files that define the model's modules, but torch's and transformers' common
    ones."""
    files = {}
    for module in {type(module).__module__ for module in model.modules()}:
        common = module.startswith("transformers.") and not module.startswith("transformers.models.")
        path = getattr(sys.modules.get(module), "__file__", None)
        if path and not common and not module.startswith("torch."):
            files[path] = os.path.basename(path)
    return files
