"""Tells transformers' own hooks, by which it captures hidden states, attentions and router logits, from the caller's.

5 puts them on a model's modules at the first call that asks for such outputs, and leaves them there; 4.57 replaces
forwards while such a call lasts. They say nothing about what the model computes: a trace makes its own.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_MODULE = "transformers.utils.output_capturing"  # of 5
INSTALLED = "_output_capturing_hooks_installed"  # the attribute of a model that has them


def captures_outputs(hook: Any) -> bool:
    """Return whether a forward hook is transformers' own, which does nothing but note what a module returns."""
    return getattr(hook, "__module__", None) == _MODULE


def remove_capturing_hooks(model: nn.Module) -> None:
    """Remove them from a model, which transformers then takes for one that has none yet."""
    for module in model.modules():
        vars(module).pop(INSTALLED, None)
        for key in [key for key, hook in module._forward_hooks.items() if captures_outputs(hook)]:
            del module._forward_hooks[key]
