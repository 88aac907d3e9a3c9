"""Gives models of transformers 5 the names of 4.57, which all of this package speaks.

past_key_values (4.57)     cache (5)                argument of forward, field of its output
cache_position             -                        5 asks the cache: get_query_offset()
get_mask_sizes(positions)  get_mask_sizes(number)
update(k, v, i, dict)      update(k, v, i, kwargs=dict)
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from autodist_fx.calls.cache_names import CACHE_ARGUMENTS, CACHE_FIELD

try:
    from transformers.initialization import no_init_weights
except ImportError:  # 4.57
    from transformers.modeling_utils import no_init_weights

_CACHE = "cache"  # 5's name of the argument and of the output's field
_KEYS_AND_VALUES = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")  # classes of cache layers
_CAPTURES_OUTPUTS = importlib.util.find_spec("transformers.utils.output_capturing") is not None  # 5 does
# 4.57's generate hands on the positions of a step's tokens, and leaves the making of unusual caches to the model.
_COUNTS_POSITIONS = "cache_position" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
_NO_CHECKS = "TRANSFORMERS_DISABLE_TORCH_CHECK"  # switches 5's torch_compilable_check off


def with_cache_named_as_before(model: PreTrainedModel) -> PreTrainedModel:
    """Return the same model, of a subclass of the same name whose forward calls its cache `past_key_values`.

    What it returns, and what hooks are given, goes by transformers' own names.
    """
    cls = type(model)
    parameters = list(inspect.signature(cls.forward).parameters.values())
    names = {p.name for p in parameters}
    if _CACHE not in names or "past_key_values" in names:
        return model
    renamed = _renamed(parameters)
    stars = {inspect.Parameter.VAR_KEYWORD: "**", inspect.Parameter.VAR_POSITIONAL: "*"}
    takes = ", ".join(f"{stars[p.kind]}{p.name}" if p.kind in stars else f"{p.name}=None" for p in renamed[1:])
    gives = ", ".join(
        f"{stars[new.kind]}{new.name}" if new.kind in stars else f"{old.name}={new.name}"
        for old, new in zip(parameters[1:], renamed[1:], strict=True)
    )
    scope: dict[str, Any] = {"cls": cls}
    exec(f"def forward(self, {takes}):\n    return cls.forward(self, {gives})", scope)
    forward = scope["forward"]
    forward.__signature__ = inspect.Signature(renamed)
    plain = [p for p in renamed[1:] if p.kind not in stars]
    forward.__defaults__ = tuple(None if p.default is p.empty else p.default for p in plain)
    attributes = {"forward": forward, "__module__": cls.__module__, "_of_transformers": cls}
    metaclass: Any = type(cls)
    model.__class__ = metaclass(cls.__name__, (cls,), attributes)
    if (replaced := vars(model).get("forward")) is not None:
        replaced.__signature__ = inspect.Signature(_renamed(inspect.signature(replaced).parameters.values()))
    return model


def _renamed(parameters: Iterable[inspect.Parameter]) -> list[inspect.Parameter]:
    return [p.replace(name="past_key_values") if p.name == _CACHE else p for p in parameters]


def own_forward(model_class: type[PreTrainedModel]) -> tuple[Callable[..., Any], dict[str, str]]:
    """Return (forward as transformers has it, {our name of an argument: its own}) of a class that
    with_cache_named_as_before made, or of any other."""
    of_transformers = vars(model_class).get("_of_transformers")
    if of_transformers is None:
        return model_class.forward, {}
    return of_transformers.forward, {"past_key_values": _CACHE}


def as_before(output: ModelOutput) -> dict[str, Any]:
    """Return the outputs by 4.57's names. No ModelOutput: version 5's renames the cache back."""
    return {"past_key_values" if name == CACHE_FIELD == _CACHE else name: value for name, value in output.items()}


def asked_of_generate(positions: torch.Tensor, rows: int, is_first: bool) -> dict[str, Any]:
    """Return what generate gives `prepare_inputs_for_generation`, beside ids, mask and cache, to say which tokens of
    `rows` sequences a step computes: those at `positions` [tokens]."""
    if _COUNTS_POSITIONS:
        return {"cache_position": positions}
    new = {"next_sequence_length": None if is_first else len(positions), "is_first_iteration": is_first}
    return {**new, "position_ids": positions.repeat(rows, 1)}


def is_given_cache(model_class: type[PreTrainedModel]) -> bool:
    """Return whether generate makes the model's cache, and hands it to the first call (5); else the model does."""
    return not _COUNTS_POSITIONS and takes_cache(model_class) and model_class._supports_default_dynamic_cache()


def takes_cache(model_class: type[PreTrainedModel]) -> bool:
    """Return whether forward takes a cache of keys and values, under any of its names."""
    return bool({"past_key_values", _CACHE} & set(inspect.signature(model_class.forward).parameters))


def is_named_as_generate_does(model_class: type[PreTrainedModel]) -> bool:
    """Return whether forward takes its cache by the name that the installed transformers' generate gives it by: a
    subclass that was written for 4.57 takes 5's among its further keywords, and sees none."""
    names = inspect.signature(model_class.forward).parameters
    only_as_before = "past_key_values" in names and _CACHE not in names and "_of_transformers" not in vars(model_class)
    return not (CACHE_FIELD == _CACHE and only_as_before)


def keeps_states(config: Any) -> bool:
    """Return whether the config's DynamicCache has layers that keep something else than keys and values (5's
    hybrids)."""
    try:
        layers = DynamicCache(config=config).layers
    except Exception:  # a config that describes no decoder
        return False
    return any(type(layer).__name__ not in _KEYS_AND_VALUES for layer in layers)


def without_return_dict(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return `plain` without the `return_dict` that 5's capture_outputs takes away, and that would be handed on
    twice."""
    names = inspect.signature(plain).parameters
    if not _CAPTURES_OUTPUTS or "return_dict" in names or not any(p.kind is p.VAR_KEYWORD for p in names.values()):
        return plain

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("return_dict", None)
        return plain(self, *args, **kwargs)

    return forward


def with_older_names(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return `plain`, a forward without transformers' wrappers, as one that takes its cache by its older names, too, as
    a subclass may hand it on that was written for 4.57."""
    names = inspect.signature(plain).parameters
    older = [name for name in CACHE_ARGUMENTS if name not in names]
    if _CACHE not in names or not older:
        return plain

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name in older:
            given = kwargs.pop(name, None)
            if given is not None:
                kwargs[_CACHE] = given
        return plain(self, *args, **kwargs)

    return forward


@contextlib.contextmanager
def without_checks() -> Iterator[None]:
    """Let 5's torch_compilable_check(condition) check nothing: it is an assertion, which a graph does not make."""
    before = os.environ.get(_NO_CHECKS)
    os.environ[_NO_CHECKS] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_NO_CHECKS)
        else:
            os.environ[_NO_CHECKS] = before


__all__ = [
    "as_before", "asked_of_generate", "is_given_cache", "is_named_as_generate_does", "keeps_states", "no_init_weights",
    "own_forward", "takes_cache", "with_cache_named_as_before", "with_older_names", "without_checks",
    "without_return_dict",
]  # fmt: skip
