"""Makes models without weights: parameters on the meta device, buffers real (they are small, and some hold tables)."""

from __future__ import annotations

import contextlib
import copy
import dis
import inspect
import re
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PretrainedConfig,
    PreTrainedModel,
)

from autodist_fx.errors import TracingError
from autodist_fx.tracing.hooks import left_as_they_are, watch
from autodist_fx.tracing.patches import PATCH_LOCK
from autodist_fx.tracing.versions.forwards import no_init_weights, with_cache_named_as_before

_LEFT_BY_CALLS: WeakKeyDictionary[type[nn.Module], frozenset[str]] = WeakKeyDictionary()  # see names_left_by_calls


def meta_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Copy the model's structure with every parameter on meta; no weight bytes are read or copied.

    Buffers, config and mode (train or eval) are copied, and hooks and replaced forwards for tracing (hooks.py). A
    parameter that several modules share (tied embeddings) is one parameter in the copy, too.

    Raises TracingError where something that hangs on a module cannot be copied.
    """
    memo: dict[int, object] = {}
    left_as_they_are(model, memo)
    for parameter in model.parameters():
        # Made new, and not by to("meta"), which of a parameter from torch.inference_mode is one that takes no gradient.
        meta = torch.empty_strided(parameter.size(), parameter.stride(), dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(meta, requires_grad=parameter.requires_grad)
    for module in model.modules():
        for tensor in _tensors(tuple(vars(module).values())):
            if not tensor.is_leaf:  # what a call computed of parameters, which deepcopy refuses
                memo[id(tensor)] = tensor.detach()
    try:
        copied = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:  # an open file, a lock, a process group
        raise TracingError(f"cannot copy the structure of {type(model).__name__}: {error}") from error
    watch(copied, model)
    for module in copied.modules():
        _forget_calls(module)
    return copied


def _forget_calls(module: nn.Module) -> None:
    """Drop tensors that an earlier call left on the module."""
    left = [name for name, value in vars(module).items() if holds_tensors(value)]
    if left:
        for name in names_left_by_calls(type(module)).intersection(left):
            setattr(module, name, None)


def names_left_by_calls(cls: type[nn.Module]) -> frozenset[str]:
    """Return the attributes in which modules of a class keep tensors of a call: a recurrent state, which the next
    sequence starts without.

    They are plain attributes, neither parameters nor buffers, which a method writes, and which the constructor leaves
    empty: a table that it makes stays, though a method may move it to another device.
    """
    known = _LEFT_BY_CALLS.get(cls)
    if known is None:
        known = _LEFT_BY_CALLS[cls] = frozenset(_written_by_methods(cls) - _made_by_constructor(cls))
    return known


def _written_by_methods(cls: type[nn.Module]) -> set[str]:
    return {
        str(instruction.argval)
        for base in cls.__mro__
        for name, method in vars(base).items()
        if inspect.isfunction(method) and name != "__init__"
        for instruction in dis.get_instructions(inspect.unwrap(method))
        if instruction.opname == "STORE_ATTR"
    }


def holds_tensors(value: object) -> bool:
    """Return whether this is a tensor, or a tuple or list with some in it."""
    return next(_tensors(value), None) is not None


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """Return a tensor, or those in a tuple or list, as a list."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _made_by_constructor(cls: type[nn.Module]) -> set[str]:
    """Return the attributes that constructors write anything but None to."""
    made = set()
    for base in cls.__mro__:
        if inspect.isfunction(constructor := vars(base).get("__init__")):
            code = list(dis.get_instructions(inspect.unwrap(constructor)))
            for value, _, store in zip(code, code[1:], code[2:], strict=False):  # the value, self, the attribute
                if store.opname == "STORE_ATTR" and not (value.opname == "LOAD_CONST" and value.argval is None):
                    made.add(str(store.argval))
    return made


def empty_model(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return the model that `config` describes, in eval mode, with parameters on meta, ties tied, and buffers real.

    `dtype` None means what the config says (float32 where it says nothing); parameters that transformers keeps in
    float32 when it loads such a model are in float32. The config is copied, never changed.

    Errors: TracingError if no language model of transformers goes with the config, or none can be built from it.
    """
    model_class = class_for(config)
    config = copy.deepcopy(config)
    keywords = {} if dtype is None else {"dtype": dtype}
    default_dtype = torch.get_default_dtype()
    with PATCH_LOCK, no_init_weights(), _parameters_on_meta():
        try:
            model = model_class._from_config(config, **keywords)
        except Exception as error:  # whatever a constructor makes of sizes that do not go together
            line = str(error).strip().partition("\n")[0]
            raise TracingError(
                f"{model_class.__name__} cannot be built from its config: {type(error).__name__}: {line}. Check the "
                "numbers in config.json"
            ) from error
        finally:
            torch.set_default_dtype(default_dtype)  # _from_config leaves its own behind when it fails
    _keep_in_float32(model)
    # Not done by _from_config: it takes whoever switches initialisation off to be about to load weights.
    model.tie_weights()
    return model.eval()


def _keep_in_float32(model: PreTrainedModel) -> None:
    """Do what from_pretrained does at its end: parameters of modules whose values leave the range of float16 (T5's
    `wo`), or lose too much in bfloat16, are in float32 beside the others."""
    half = model.dtype
    kept = list(model._keep_in_fp32_modules or ()) if half == torch.float16 else []
    kept += list(model._keep_in_fp32_modules_strict or ()) if half in (torch.float16, torch.bfloat16) else []
    if kept:
        named = re.compile("|".join(rf"((^|\.){module}($|\.))" for module in kept))
        for name, parameter in model.named_parameters():
            if named.search(name) and parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.float32)


def class_for(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the model class of a config. Raises TracingError where transformers has none."""
    named, mapped = _named_class(config), _mapped_class(config)
    # A config that is not transformers' may call its model's class as transformers calls one of its own.
    found = (named or mapped) if type(config).__module__.startswith("transformers.") else (mapped or named)
    if found is not None:
        return found
    raise TracingError(
        f"no causal or sequence-to-sequence language model of transformers {transformers.__version__} goes with "
        f"{type(config).__name__} (architectures={getattr(config, 'architectures', None)}): pass a model instead of a "
        f"config"
    )


def _named_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    for name in getattr(config, "architectures", None) or ():
        model_class = getattr(transformers, name, None)
        if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
            return model_class
    return None


def _mapped_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    mappings = _DECODERS_FIRST if not getattr(config, "is_encoder_decoder", False) else _DECODERS_FIRST[::-1]
    found = (auto_class._model_mapping.get(type(config), None) for auto_class in mappings)
    return next((model_class for model_class in found if model_class is not None), None)


# Some configs go with several: the decoder of an encoder-decoder model is a causal language model, too.
_DECODERS_FIRST = (AutoModelForCausalLM, AutoModelForSpeechSeq2Seq, AutoModelForSeq2SeqLM)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Swap each parameter for a meta one as a module registers it, before anything has touched its memory.

    transformers' `init_empty_weights` does the same, but makes a new parameter of one that is on meta already, which
    unties what a constructor ties.
    """
    register_parameter = nn.Module.register_parameter

    def register_meta_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            attributes = parameter.__dict__
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            parameter.__dict__.update(attributes)
        register_parameter(module, name, parameter)

    nn.Module.register_parameter = register_meta_parameter
    try:
        yield
    finally:
        nn.Module.register_parameter = register_parameter



def class_of(model: PreTrainedModel | PretrainedConfig) -> type[PreTrainedModel]:
    return class_for(model) if isinstance(model, PretrainedConfig) else type(model)


def config_of(model: PreTrainedModel | PretrainedConfig) -> PretrainedConfig:
    return model if isinstance(model, PretrainedConfig) else model.config


def model_to_trace(model: PreTrainedModel | PretrainedConfig) -> PreTrainedModel:
    """Make a copy on meta whose forward takes its cache as `past_key_values`, and whose attention is plain torch: the
    others (flash, flex) call kernels that a graph cannot hold."""
    made = with_cache_named_as_before(empty_model(model) if isinstance(model, PretrainedConfig) else meta_copy(model))
    if made.config._attn_implementation not in ("sdpa", "eager"):
        made.set_attn_implementation("sdpa" if made._supports_sdpa else "eager")
    return made
