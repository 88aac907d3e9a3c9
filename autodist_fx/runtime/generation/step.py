"""`Step`: one forward pass of a rank, the same on the rank that leads a generation and on those that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from autodist_fx.calls.lengths import Lengths
from autodist_fx.runtime.cache.cross_cache import Encoded
from autodist_fx.runtime.cache.kv_cache import SplitCache


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The inputs of one forward pass on a rank. Tensors the graph takes none of may be None."""

    cache: SplitCache
    input_ids: torch.Tensor  # int64 [batch, tokens]
    attention_mask: torch.Tensor | None  # int64 [batch, cached + tokens]
    position_ids: torch.Tensor | None  # int64 [batch, tokens]; None: the model counts them
    cache_position: torch.Tensor  # int64 [tokens]: places in the cache
    encoded: Encoded | None = None  # what the encoder gave, in a model with one
    shows_all: bool = False  # the mask is ones, since the call gave none
    # Inputs that no usual step has (images, sounds, token types), or positions of several kinds: by forward's names.
    further: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def lengths(self) -> Lengths:
        """Return the sizes that guards ask for, as they are before the step runs."""
        batch, tokens = self.input_ids.shape
        past = self.cache.tokens
        lengths = {"B": batch, "S": tokens, "P": past, "T": past + tokens}
        return lengths if self.encoded is None else {**lengths, **self.encoded.lengths}
