"""Parametrizations that a forward registers, and removes again (peft's adapters of single parameters): while a model is
traced, the module has what they compute in the parameter's place."""

from __future__ import annotations

from typing import Any

from torch import nn


class _Parametrizations(list[nn.Module]):
    """Of one parameter; as torch's ParametrizationList, with `original`."""

    original: Any


def register(module: nn.Module, tensor_name: str, parametrization: nn.Module, *, unsafe: bool = False) -> nn.Module:
    """For torch.nn.utils.parametrize.register_parametrization, whose checks look into tensors."""
    attributes = vars(module)
    chain = attributes.setdefault("parametrizations", {}).setdefault(tensor_name, _Parametrizations())
    if not chain:
        chain.original = getattr(module, tensor_name)
    chain.append(parametrization)
    attributes[tensor_name] = parametrization.forward(getattr(module, tensor_name))
    return module


def remove(module: nn.Module, tensor_name: str, leave_parametrized: bool = True) -> nn.Module:
    """For torch.nn.utils.parametrize.remove_parametrizations, of those that `register` put there."""
    attributes = vars(module)
    del attributes["parametrizations"][tensor_name], attributes[tensor_name]
    if not attributes["parametrizations"]:
        del attributes["parametrizations"]
    return module
