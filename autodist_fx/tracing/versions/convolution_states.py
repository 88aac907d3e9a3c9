"""Lets the graph of a prompt fill a convolution's state from prompts of any length (transformers 5).

Its cache pads a prompt that is shorter than the convolution's kernel, and asks for that in Python, so that a graph made
of a longer one would not. Zeros ahead of every prompt leave the same state, the last tokens of both, without asking.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import cache_utils

Patch = Callable[[Any, str, Any], None]  # (owner, name, value), undone when tracing is over


def pad_every_prompt(patch: Patch) -> None:
    """Patch transformers' linear attention layers, where it has some (not 4.57, whose models pad by themselves)."""
    layer = getattr(cache_utils, "LinearAttentionLayer", None)
    if layer is None:
        return
    own = layer.update_conv_state

    def update_conv_state(
        self: Any, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **more: Any
    ) -> torch.Tensor:
        if self.has_previous_state[state_idx] or conv_kernel_size is None:  # None: the model has padded it
            return own(self, conv_states, state_idx, conv_kernel_size=conv_kernel_size, **more)
        padded = torch.nn.functional.pad(conv_states, (conv_kernel_size, 0))
        own(self, padded, state_idx, conv_kernel_size=conv_kernel_size, **more)
        return conv_states

    patch(layer, "update_conv_state", update_conv_state)
