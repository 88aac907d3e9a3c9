"""`GrowingLayer`: a layer of a KV cache that writes new tokens behind the old ones, in memory that has room for more.

transformers' DynamicLayer makes a new tensor of all tokens at each step (torch.cat): for 32 sequences of 640 tokens
that is more than a step on a CPU reads of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

_LEAST_SPARE = 64  # tokens that new memory has room for, beside those that are there,
_SPARE_SHARE = 4  # or a quarter of these, if that is more


@dataclass(slots=True)
class _Room:
    """Memory [batch, heads, tokens, size] for keys and for values, of which the first `used` tokens are written, by
    whichever cache: copies of a layer share its room. `keys` and `values` are views of all that is written."""

    key_memory: torch.Tensor
    value_memory: torch.Tensor
    used: int
    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor) -> _Room:
        """Return a room with these tokens."""
        tokens = keys.shape[-2]
        room = tokens + max(_LEAST_SPARE, tokens // _SPARE_SHARE)
        for_keys = keys.new_empty(*keys.shape[:-2], room, keys.shape[-1])
        for_values = values.new_empty(*values.shape[:-2], room, values.shape[-1])
        written = for_keys.narrow(-2, 0, tokens).copy_(keys), for_values.narrow(-2, 0, tokens).copy_(values)
        return cls(for_keys, for_values, tokens, *written)

    def takes(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Return whether there is room for new tokens like these, whose rows are those here."""
        memory = self.key_memory
        return (
            self.used + keys.shape[-2] <= memory.shape[-2]
            and keys.shape[0] == values.shape[0] == memory.shape[0]
            and keys.dtype == memory.dtype
            and (not memory.is_inference() or torch.is_inference_mode_enabled())
        )

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write new tokens behind what is there."""
        begin, tokens = self.used, keys.shape[-2]
        self.key_memory.narrow(-2, begin, tokens).copy_(keys)
        self.value_memory.narrow(-2, begin, tokens).copy_(values)
        self.used = begin + tokens
        self.keys = self.key_memory.narrow(-2, 0, self.used)
        self.values = self.value_memory.narrow(-2, 0, self.used)


class GrowingLayer(DynamicLayer):
    """A DynamicLayer whose keys and values are views of memory with room, which only ever gets more: whoever holds what
    they were before, or a copy of this layer, keeps it."""

    keys: torch.Tensor | None
    values: torch.Tensor | None
    _room: _Room | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the tokens of a step, [batch, heads, tokens, size] each; return those of all steps."""
        room = self._room
        # Where somebody has put other tensors here (a crop, an order of beams), or a copy has written on, or gradients
        # come back, it is transformers' to say what the tokens are.
        if room is None or self.keys is not room.keys or self.values is not room.values or not (
            room.takes(key_states, value_states)
        ) or (key_states.requires_grad or value_states.requires_grad):
            goes_on = self.is_initialized and self.get_seq_length() > 0
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            if goes_on and not (keys.requires_grad or values.requires_grad):
                self._room = room = _Room.of(keys, values)
                self.keys, self.values = room.keys, room.values
            else:
                self._room = None
            return self.keys, self.values
        room.append(key_states, value_states)
        self.keys, self.values = room.keys, room.values
        return room.keys, room.values

    def reset(self) -> None:
        """Forget what the installed transformers forgets; 4.57 writes zeros, which are then this layer's own."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.clone(), self.values.clone()
        super().reset()
