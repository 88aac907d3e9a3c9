"""Patches all of torch and transformers that has to be different while a model is traced, in one context manager.

The patches are process-global: a lock keeps two traces apart, but a model that runs in another thread meanwhile sees
them too.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, masking_utils, modeling_rope_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from autodist_fx.tracing.control_flow.conditions import decide, is_instance, longest
from autodist_fx.tracing.control_flow.constants import CONVERSIONS, numpy_ufunc
from autodist_fx.tracing.control_flow.loops.range_loops import outlined_loops
from autodist_fx.tracing.control_flow.rotary import updating_frequencies
from autodist_fx.tracing.control_flow.value_branches import hide_buffer, set_attribute
from autodist_fx.tracing.gradient_regions import patch_contexts
from autodist_fx.tracing.hooks import (
    calls_attached,
    has_attached_itself,
    refuse_autocast,
    register_parametrization,
    remove_parametrizations,
)
from autodist_fx.tracing.in_place import IN_PLACE
from autodist_fx.tracing.versions.convolution_states import pad_every_prompt
from autodist_fx.tracing.versions.forwards import own_forward, with_older_names, without_checks, without_return_dict
from autodist_fx.tracing.versions.masks import patch_masks
from autodist_fx.tracing.versions.sliding_layers import keep_all_tokens
from autodist_fx.tracing.versions.tracer_base import AttributeProxy, DeviceAttribute, SymbolicProxy, patch_base

# Of every config, while a model is traced: what a model's own config says here makes no difference to its graph.
FLAGS_SET_FOR_TRACING = ("use_cache", "return_dict", "output_attentions", "output_hidden_states")
PATCH_LOCK = threading.RLock()  # reentrant: traceable() may be entered by a holder of it


@contextlib.contextmanager
def traceable(
    model: PreTrainedModel,
    *,
    use_cache: bool,
    records: bool = False,
    keeps_states: bool = False,
    keywords: Sequence[str] = (),
) -> Iterator[None]:
    """Let `model` be run on meta tensors and traced while the context lasts; everything is put back in the end, on
    error too.

    The flags of the model's configs are set to what a traced forward needs (`use_cache` as given, outputs as a
    `ModelOutput`, no attention maps, no hidden states but where the call asks for them), and restored with the rest.
    `records`: the call does; then the wrappers of models that collect what layers return stay where they are.
    `keeps_states`: tensors that modules of `model` (a copy) are left with are the states of a recurrence, to be read
    afterwards.
    `keywords`: what goes into forward's **kwargs and is an input of the graph.
    """
    with torch.device("meta"):
        torch.empty(0)  # torch lists its constructors at their first use under a device: its own, and not the patched
    with PATCH_LOCK, contextlib.ExitStack() as undo:

        def patch(owner: Any, name: str, value: Any) -> None:
            # owner.__dict__ and not getattr: a staticmethod has to come back as one.
            if name in owner.__dict__:
                undo.callback(setattr, owner, name, owner.__dict__[name])
            else:
                undo.callback(delattr, owner, name)
            setattr(owner, name, value)

        for config in _configs(model):
            undo.callback(_restore_attributes, config, dict(config.__dict__))
            flags = use_cache and not _is_of_encoder(config, model.config), True, False, False
            for name, value in zip(FLAGS_SET_FOR_TRACING, flags, strict=True):
                # A part that keeps no cache takes no use_cache, which 4.57 hands on where the config has it.
                if name != "use_cache" or config is model.config or hasattr(config, name):
                    setattr(config, name, value)

        of_root = next(cls for cls in type(model).__mro__ if "forward" in cls.__dict__)
        for cls in {cls for module in model.modules() for cls in type(module).__mro__ if "forward" in cls.__dict__}:
            # @check_model_inputs, @can_return_tuple, ...: fx reads the argument names off the function's code, and a
            # wrapper's code has only (*args, **kwargs).
            forward = cls.__dict__["forward"]
            collects = records and issubclass(cls, PreTrainedModel)
            run, plain = forward if collects else _without_wrappers(forward), inspect.unwrap(forward)
            run = updating_frequencies(forward) or run
            if run is not forward and cls is not of_root:
                run = with_older_names(without_return_dict(run))
            if cls is of_root and run is not plain:
                run = _with_signature_of(plain, run)
            if run is not forward:
                patch(cls, "forward", run)
        if has_attached_itself(model):
            run, (called, own_names) = type(model).forward, own_forward(type(model))
            if "forward" not in vars(model):
                vars(model)["forward"] = types.MethodType(called, model)
                undo.callback(vars(model).pop, "forward")
            patch(type(model), "forward", _with_signature_of(run, calls_attached(run, own_names)))
        if keywords:
            run = type(model).forward
            patch(type(model), "forward", _with_signature_of(run, run, keywords))
        patch(torch.nn.Module, "register_buffer", hide_buffer)
        patch(torch.nn.Module, "__setattr__", set_attribute)
        patch(GradientCheckpointingLayer, "__call__", _call_as_module)
        if keeps_states:
            keep_all_tokens(patch)
            pad_every_prompt(patch)
        else:
            undo.enter_context(kept_tensors(model))

        # A mask that is ready is known by isinstance(mask, torch.Tensor), by masking_utils and by the models' own code.
        defining = _defining_modules(model)
        for file in {masking_utils.__name__, modeling_rope_utils.__name__, *defining, *_helping_modules(defining)}:
            names = vars(sys.modules[file])
            if "isinstance" not in names:
                undo.callback(names.pop, "isinstance")
                names["isinstance"] = _isinstance

        text = model.config.get_text_config()
        patch_masks(patch, both_ways=bool(getattr(text, "use_bidirectional_attention", None)), use_cache=use_cache)
        patch_base(patch)
        patch_contexts(patch)
        undo.enter_context(without_checks())
        # To unpack a proxy, fx disassembles the function that does so, each time.
        patch(torch.fx.proxy, "dis", types.SimpleNamespace(get_instructions=functools.cache(_instructions)))
        patch(torch, "autocast", _autocast)
        patch(nn.utils.parametrize, "register_parametrization", register_parametrization)
        patch(nn.utils.parametrize, "remove_parametrizations", remove_parametrizations)
        patch(nn.Parameter, "__new__", staticmethod(_parameter_of(nn.Parameter.__new__)))
        patch(DeviceAttribute, "index", None)  # the first of its kind, or the only one
        for name, convert in CONVERSIONS.items():
            patch(SymbolicProxy, name, convert)
        for name, write in IN_PLACE.items():
            patch(SymbolicProxy, name, write)
        patch(SymbolicProxy, "__array_ufunc__", numpy_ufunc)
        patch(SymbolicProxy, "__bool__", decide)
        patch(torch._dynamo, "mark_static_address", _nothing)  # a hint for torch.compile, which takes tensors only
        patch(SymbolicProxy, "ndim", property(_dims))  # `[(0, 0)] * x.ndim`
        undo.enter_context(outlined_loops(_defining_modules(model)))
        for name in _defining_modules(model):
            for global_name, value in list(vars(sys.modules[name]).items()):
                # A compiled function takes no proxies; TorchScript keeps what it was compiled from, for torch.compile.
                if isinstance(value, torch.jit.ScriptFunction) and hasattr(value, "_torchdynamo_inline"):
                    patch(sys.modules[name], global_name, value._torchdynamo_inline)
            for function, traced in ((max, longest(max)), (min, longest(min)), (isinstance, is_instance)):
                _shadow_builtin(sys.modules[name], function, traced, undo)
            if vars(sys.modules[name]).get("torch") is torch and "torch.fx.Proxy" in _source(name):
                patch(sys.modules[name], "torch", _TorchThatTracesUnseen("torch"))
        if hasattr(PreTrainedModel, "warn_if_padding_and_no_attention_mask"):  # looks at values, to warn of some
            patch(PreTrainedModel, "warn_if_padding_and_no_attention_mask", _nothing)
        yield


def _without_wrappers(forward: Any) -> Any:
    """Return `forward` without what transformers and torch.no_grad wrap around it. What others put there is of the
    model."""
    while hasattr(forward, "__wrapped__") and forward.__globals__["__name__"].startswith(("transformers.", "torch.")):
        forward = forward.__wrapped__
    return forward


def _with_signature_of(
    plain: Callable[..., Any], wrapper: Callable[..., Any], keywords: Sequence[str] = ()
) -> Callable[..., Any]:
    """Return `wrapper`, as a function with the argument names of `plain` in its own code, which is where fx reads
    them; `keywords` are more of them."""
    parameters = list(inspect.signature(plain).parameters.values())
    starred = [p for p in parameters if p.kind is p.VAR_KEYWORD]
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in keywords]
    parameters = [*(p for p in parameters if p not in starred), *more, *starred]
    stars = {inspect.Parameter.VAR_KEYWORD: "**", inspect.Parameter.VAR_POSITIONAL: "*"}
    own, *others = parameters
    takes = [f"{stars[p.kind]}{p.name}" if p.kind in stars else f"{p.name}=None" for p in others]
    gives = [f"{stars[p.kind]}{p.name}" if p.kind in stars else f"{p.name}={p.name}" for p in others]
    made: dict[str, Any] = {"wrapper": wrapper}
    exec(f"def forward({', '.join([own.name, *takes])}):\n    return wrapper({', '.join([own.name, *gives])})", made)
    made["forward"].__signature__ = inspect.signature(plain).replace(parameters=parameters)
    return made["forward"]


class _Nobody:
    """A class without instances."""


class _TorchThatTracesUnseen(types.ModuleType):
    """A torch where nothing is a torch.fx.Proxy: for a model's file that computes something else when it is traced."""

    fx = types.SimpleNamespace(Proxy=_Nobody)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _instructions(code: types.CodeType) -> list[dis.Instruction]:
    return list(dis.get_instructions(code))


@functools.cache
def _source(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError):
        return ""


def _shadow_builtin(
    module: types.ModuleType, builtin: Callable[..., Any], traced: Callable[..., Any], undo: contextlib.ExitStack
) -> None:
    """Let `traced` stand for a builtin in this module; where it has a global of that name already, that one stays."""
    name = builtin.__name__
    if name not in vars(module):
        undo.callback(vars(module).pop, name)
        vars(module)[name] = traced


def _dims(proxy: SymbolicProxy) -> Any:
    """Return how many dims a traced tensor has: the same for all inputs."""
    known = getattr(proxy, "_metadata", None)
    return known.dim() if isinstance(known, torch.Tensor) else AttributeProxy(proxy, "ndim")


def _defining_modules(model: PreTrainedModel) -> list[str]:
    """Return the Python modules that define the model's own classes."""
    names = dict.fromkeys(cls.__module__ for module in model.modules() for cls in type(module).__mro__)
    return [name for name in names if not name.startswith("torch.") and name not in ("builtins", "torch")]


def _helping_modules(defining: Sequence[str]) -> set[str]:
    """Return the Python modules of functions that these import from their own package, transformers' excepted."""
    return {
        value.__module__
        for name in defining
        for value in vars(sys.modules[name]).values()
        if isinstance(value, types.FunctionType)
        and value.__module__ in sys.modules
        and value.__module__.partition(".")[0] == name.partition(".")[0] != "transformers"
    }


def _configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    """Return each config object that some module of the model holds, once."""
    held = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in held if isinstance(config, PretrainedConfig)}.values())


def _is_of_encoder(config: PretrainedConfig, of_model: PretrainedConfig) -> bool:
    """Return whether this is the config of an encoder before a decoder, and of nothing else."""
    return of_model.is_encoder_decoder and config is not of_model and not getattr(config, "is_decoder", False)


def _restore_attributes(owner: Any, attributes: dict[str, Any]) -> None:
    owner.__dict__.clear()
    owner.__dict__.update(attributes)


@contextlib.contextmanager
def kept_tensors(model: torch.nn.Module) -> Iterator[None]:
    """Restore, in the end, tensors that modules keep as plain attributes (tables, moved to a call's device or grown
    with its length): neither a meta tensor nor a traced one stays behind."""
    before = {module: dict(vars(module)) for module in model.modules()}
    try:
        yield
    finally:
        for module, attributes in before.items():
            for name, value in list(vars(module).items()):
                was = attributes.get(name)
                if name.startswith("_tensor_constant"):
                    continue  # made by fx, for the graph
                if value is not was and any(isinstance(v, (torch.Tensor, torch.fx.Proxy)) for v in (value, was)):
                    vars(module).pop(name) if name not in attributes else vars(module).update({name: was})


def _call_as_module(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    # Looked up at each call: fx replaces Module.__call__ while it traces, and has to see these modules too.
    return torch.nn.Module.__call__(module, *args, **kwargs)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _isinstance(value: Any, kinds: Any) -> bool:
    """Return what Python's own does, but a proxy that stands for a tensor is one."""
    example = getattr(value, "_metadata", None) if isinstance(value, SymbolicProxy) else None
    return isinstance(value, kinds) or (isinstance(example, torch.Tensor) and isinstance(example, kinds))


def _parameter_of(new: Callable[..., Any]) -> Callable[..., Any]:
    """Return nn.Parameter's `__new__`, to which a parameter made of a traced value is that value."""

    def make(cls: type, data: Any = None, *args: Any, **kwargs: Any) -> Any:
        return data if isinstance(data, torch.fx.Proxy) else new(cls, data, *args, **kwargs)

    return make


def _autocast(device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None) -> Any:
    # Rotary embeddings switch autocast off for the device of their input, and torch knows of none for meta.
    if enabled:
        refuse_autocast()
    return contextlib.nullcontext()
