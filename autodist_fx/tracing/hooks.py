"""Traces forward hooks, forward pre-hooks and replaced forwards: Python of the caller's that hangs on single modules.

What they compute with tensors is traced, and part of the graph as if it stood in the model. One that keeps what it is
given, or changes something that outlives its call, does what no graph can, and is refused by name.
"""

from __future__ import annotations

import dis
import functools
import inspect
import os
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from autodist_fx.errors import AutodistError, TracingError
from autodist_fx.tracing.versions.capturing_hooks import captures_outputs, remove_capturing_hooks

_KINDS = {"_forward_pre_hooks": "forward pre-hook", "_forward_hooks": "forward hook"}
_BACKWARD_KINDS = {"_backward_pre_hooks": "backward pre-hook", "_backward_hooks": "backward hook"}
_GLOBAL = {
    "_global_forward_pre_hooks": "forward pre-hook",
    "_global_forward_hooks": "forward hook",
    "_global_backward_pre_hooks": "backward pre-hook",
    "_global_backward_hooks": "backward hook",
}
_FORWARD = "forward"
# accelerate's own, which only bring tensors to the device of their module: where a rank's tensors are is its own affair
_DEVICE_HOOKS = frozenset({"AlignDevicesHook", "CpuOffload"})
_MOST_VALUES = 10_000  # of what a hook reaches, that are looked at for changes


@dataclass(frozen=True, slots=True)
class Attached:
    """A hook, or a forward that a module has instead of its class's. Prints as "the forward hook f (file.py:12) of
    model.norm"."""

    kind: str
    path: str  # of the module
    function: Callable[..., Any]

    def __str__(self) -> str:
        return f"the {self.kind} {_name(self.function)} of {self.path or 'the model'}"


def attached_to(model: nn.Module) -> list[Attached]:
    """Return every forward hook, forward pre-hook and replaced forward of the model's modules, but those that only
    move tensors between devices (accelerate's, of a model that was loaded with `device_map`) and transformers' own."""
    found = []
    for path, module in model.named_modules():
        forward = own_forward(module)
        if forward is not None:
            found.append(Attached(_FORWARD, path, forward))
        for attribute, kind in _KINDS.items():
            hooks = getattr(module, attribute).values()
            found += [Attached(kind, path, function) for function in hooks if not captures_outputs(function)]
    return found


def backward_hooks_of(model: nn.Module) -> list[Attached]:
    """Return every backward hook of the model's modules, and the hooks of its parameters that run when a gradient
    has been added."""
    found = [
        Attached(kind, path, function)
        for path, module in model.named_modules()
        for attribute, kind in _BACKWARD_KINDS.items()
        for function in getattr(module, attribute).values()
    ]
    for name, parameter in model.named_parameters():
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        found += [Attached("post-accumulate-grad hook", name, function) for function in hooks.values()]
    return found


def refuse_global_hooks() -> None:
    """Raise AutodistError where a hook is there for all modules: it would see a rank's pieces, and not the model's."""
    for attribute, kind in _GLOBAL.items():
        for function in getattr(nn_module, attribute).values():
            raise AutodistError(
                f"the {kind} {_name(function)} is registered for all modules (torch.nn.modules.module), and a rank's "
                "modules are not the model's: remove it, or register it on modules of the model before compiling"
            )


def refuse_autocast() -> None:
    """Raise TracingError: torch.autocast is on in the forward that is being traced."""
    raise TracingError(
        "torch.autocast is on in a part of the model, and a graph computes in the dtypes that tensors have: take it "
        "out, and convert with .to(dtype)"
    )


def own_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Return the forward that this module has instead of its class's; None where it has none."""
    forward = vars(module).get(_FORWARD)
    if forward is not None and _only_moves(vars(module).get("_hf_hook")):
        forward = vars(module).get("_old_forward", forward)
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)  # torch.compile's computes the same
    if isinstance(forward, types.MethodType) and forward.__self__ is module:
        if forward.__func__ is getattr(type(module), _FORWARD):
            return None  # the class's, put back
    return forward


def has_attached(module: nn.Module) -> bool:
    """Return whether a call of this module, or of one inside it, is more or something else than its class's forward."""
    return any(has_attached_itself(each) for each in module.modules())


def has_attached_itself(module: nn.Module) -> bool:
    """Return whether a call of this module is, leaving aside those inside it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or _FORWARD in vars(module))


def of_another_class(module: nn.Module) -> bool:
    """Return whether the forward of this module's class is not the one that was written there (nn.Linear.forward =
    ...)."""
    cls = next(cls for cls in type(module).__mro__ if _FORWARD in vars(cls))
    code = getattr(vars(cls)[_FORWARD], "__code__", None)
    return code is None or code.co_filename != inspect.getfile(cls)


# -- while a model is traced ------------------------------------------------------------------------------------------


def left_as_they_are(model: nn.Module, memo: dict[int, object]) -> None:
    """Note for copy.deepcopy of the model that hooks are not copied: they may hold anything."""
    for module in model.modules():
        memo.update({id(hook): hook for hook in (vars(module).get("_hf_hook"),) if hook is not None})
        for attribute in (*_KINDS, *_BACKWARD_KINDS):
            memo.update({id(function): function for function in getattr(module, attribute).values()})
    memo.update({id(each.function): each.function for each in attached_to(model)})


def watch(copied: nn.Module, model: nn.Module) -> None:
    """Give `copied`, a copy of `model`, the same hooks and forwards, each watched for what no graph can hold."""
    remove_capturing_hooks(copied)
    own = {each.path: each for each in attached_to(model) if each.kind == _FORWARD}
    copies = {module: copied.get_submodule(path) for path, module in model.named_modules()} if own else {}
    for path, module in copied.named_modules():
        vars(module).pop(_FORWARD, None)
        if path in own:
            vars(module)[_FORWARD] = Watched(own[path], model, _rebound(own[path].function, copies))
        for attribute, kind in _KINDS.items():
            hooks = getattr(module, attribute)
            for key, function in list(hooks.items()):
                hooks[key] = Watched(Attached(kind, path, function), model, function)
        for attribute in _BACKWARD_KINDS:
            getattr(module, attribute).clear()


def traced_for(copied: nn.Module) -> nn.Module | None:
    """Return the caller's model, of which `copied` has watched hooks, None without any: they may read its modules."""
    for module in copied.modules():
        for each in (vars(module).get(_FORWARD), *module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if isinstance(each, Watched):
                return each.model
    return None


@dataclass(eq=False)
class Watched:
    """A hook or a forward while it is traced.

    Raises TracingError, which names it, where it cannot be traced, or leaves anything behind.
    """

    attached: Attached
    model: nn.Module  # the caller's
    run: Callable[..., Any]  # the hook; a forward bound to the copy
    replaced: dict[str, Any] = field(default_factory=dict)  # attributes of the module that a pre-hook gave new values

    def __post_init__(self) -> None:
        functools.update_wrapper(self, self.attached.function, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = state_of(self.attached)
        found = self.run(*args, **kwargs) if self.attached.kind == _FORWARD else self._run_hook(*args, **kwargs)
        if state_of(self.attached) != before:
            raise self._refusal("keeps what it is given, or changes what outlives its call")
        return found

    def _run_hook(self, module: nn.Module, *args: Any) -> Any:
        attributes = _attributes(module)
        try:
            found = self.run(module, *args)
        except AutodistError:
            raise
        except Exception as error:
            line = str(error).strip().partition("\n")[0]
            raise self._refusal(f"cannot be traced ({type(error).__name__}: {line})") from error
        self._note_replaced(module, attributes)
        return found

    def _note_replaced(self, module: nn.Module, before: Mapping[str, Any]) -> None:
        """Note what a pre-hook gives forward to read (weight_norm: `weight`), which is part of its computation; else
        refuse it."""
        now = _attributes(module)
        changed = [name for name in now if name not in before or now[name] is not before[name]]
        comes_before = self.attached.kind == _KINDS["_forward_pre_hooks"]
        read = _names_in(type(module).forward, "LOAD_ATTR") if comes_before else set()
        if unread := [name for name in changed if name not in read or name not in before]:
            raise self._refusal(f"leaves {', '.join(unread)} on the module")
        self.replaced.update({name: before[name] for name in changed})

    def _refusal(self, what: str) -> TracingError:
        return TracingError(
            f"{self.attached} {what}: a graph holds only what computes with tensors. Remove it before compiling, and "
            "take what it looks at from the model's outputs (output_hidden_states=True)"
        )


def restore_attributes(module: nn.Module) -> None:
    """Give attributes that pre-hooks set in a call their values from before."""
    for each in reversed(module._forward_pre_hooks.values()):
        if isinstance(each, Watched):
            vars(module).update(each.replaced)
            each.replaced.clear()


def calls_attached(plain: Callable[..., Any], names: Mapping[str, str]) -> Callable[..., Any]:
    """Return the forward for fx, which calls that of the root's class: what `model(...)` would call, with its hooks.
    They get, as keywords, the arguments that differ from the defaults of `plain`, which is that forward, each by its
    own name where `names` has one."""
    usual = {name: p.default for name, p in inspect.signature(plain).parameters.items()}

    def forward(self: nn.Module, **kwargs: Any) -> Any:
        given = {name: value for name, value in kwargs.items() if name not in usual or value is not usual[name]}
        return self._call_impl(**{names.get(name, name): value for name, value in given.items()})

    return forward


# -- parametrizations that a forward registers, and removes again (peft's adapters of single parameters) --------------


class _Parametrizations(list[nn.Module]):
    """The parametrizations of one parameter; as torch's ParametrizationList, with `original`."""

    original: Any


def register_parametrization(
    module: nn.Module, tensor_name: str, parametrization: nn.Module, *, unsafe: bool = False
) -> nn.Module:
    """Stand for torch.nn.utils.parametrize.register_parametrization, whose checks look into tensors."""
    attributes = vars(module)
    chain = attributes.setdefault("parametrizations", {}).setdefault(tensor_name, _Parametrizations())
    if not chain:
        chain.original = getattr(module, tensor_name)
    chain.append(parametrization)
    attributes[tensor_name] = parametrization.forward(getattr(module, tensor_name))
    return module


def remove_parametrizations(module: nn.Module, tensor_name: str, leave_parametrized: bool = True) -> nn.Module:
    """Stand for torch.nn.utils.parametrize.remove_parametrizations, of those that the other put there."""
    attributes = vars(module)
    del attributes["parametrizations"][tensor_name], attributes[tensor_name]
    if not attributes["parametrizations"]:
        del attributes["parametrizations"]
    return module


# -- what a hook reaches ----------------------------------------------------------------------------------------------


def state_of(attached: Attached) -> tuple[object, ...]:
    """Return what decides what a hook computes, as far as it can be seen: equal before and after a call that leaves
    nothing."""
    return tuple(reached(attached.function))


def reached(start: object, *, modules: bool = True) -> Iterator[object]:
    """Return the values that a function reaches: in its closure, its defaults, the globals that it names, its
    object. Numbers and text by value, all else by identity; tensors also by how often they were written. `modules`:
    with attributes."""
    seen: set[int] = set()
    left = [start]
    while left and len(seen) < _MOST_VALUES:
        value = left.pop()
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
            yield repr(value)
            continue
        yield id(value)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield None if value.is_inference() else value._version
        elif isinstance(value, nn.Module):
            if modules:
                yield tuple((name, id(item)) for name, item in _attributes(value).items())
        else:
            left += _inside(value)


def _inside(value: object) -> list[object]:
    """Return what a value holds, but nothing of what is not the caller's: classes, and objects of libraries."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.FunctionType):
        if _is_of_a_library(value.__module__):
            return []
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        named = [value.__globals__[n] for n in sorted(_names_in(value, "LOAD_GLOBAL")) if n in value.__globals__]
        values = [v for v in named if not isinstance(v, (types.ModuleType, type))]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *values]
    if isinstance(value, type) or _is_of_a_library(type(value).__module__):
        return []
    calls = [vars(cls)["__call__"] for cls in type(value).__mro__ if "__call__" in vars(cls)]
    return [*getattr(value, "__dict__", {}).values(), *calls]


def _is_of_a_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in ("torch", "transformers", "numpy", "accelerate", "peft", "builtins")


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  raises where the variable has no value yet
    except ValueError:
        return False
    return True


def _names_in(function: Callable[..., Any], operation: str) -> set[str]:
    """Return the names that a function's code, and that of functions inside it, load: "LOAD_GLOBAL", "LOAD_ATTR"."""
    code = getattr(function, "__code__", None)
    found: set[str] = set()
    left = [code] if code is not None else []
    while left:
        each = left.pop()
        found.update(i.argval for i in dis.get_instructions(each) if i.opname == operation)
        left += [constant for constant in each.co_consts if isinstance(constant, types.CodeType)]
    return found


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the plain attributes, which are no parameters, buffers, modules and hooks."""
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _rebound(function: Callable[..., Any], copies: Mapping[nn.Module, nn.Module]) -> Callable[..., Any]:
    """Return a bound method or partial, of the copies of its modules."""
    if isinstance(function, types.MethodType):
        owner = function.__self__
        return types.MethodType(function.__func__, copies.get(owner, owner) if isinstance(owner, nn.Module) else owner)
    if isinstance(function, functools.partial):
        args = [copies.get(a, a) if isinstance(a, nn.Module) else a for a in function.args]
        return functools.partial(_rebound(function.func, copies), *args, **function.keywords)
    return function


def _only_moves(hook: object) -> bool:
    """Return whether a hook of accelerate's does nothing but move tensors between devices."""
    hooks = getattr(hook, "hooks", None) or (hook,)
    return all(type(h).__module__ == "accelerate.hooks" and type(h).__name__ in _DEVICE_HOOKS for h in hooks)


def _name(function: object) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    plain = function if isinstance(function, (types.FunctionType, types.MethodType)) else None
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    code = getattr(plain, "__code__", None)
    return name if code is None else f"{name} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"
