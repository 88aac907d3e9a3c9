"""Stand-ins for an encoder over ranks: the module that transformers' generate calls, and the output that it gets.

What the encoder really gives stays on the ranks (runtime/cache/cross_cache.py); generate counts rows and tokens of the
stand-in.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from autodist_fx.errors import AutodistError
from autodist_fx.runtime.cache.cross_cache import Encoded


class EncoderOutput(BaseModelOutput):
    """An encoder output that says where the ranks have what the encoder gave; its own tensor is [rows, tokens, 0]."""

    encoded: Encoded

    @classmethod
    def of(cls, encoded: Encoded, rows: int, length: int, device: torch.device) -> EncoderOutput:
        """Return the output that stands for `encoded`, with so many rows of so many tokens."""
        output = cls(last_hidden_state=torch.empty(rows, length, 0, device=device))
        output.encoded = encoded
        return output


class EncodingModel(Protocol):
    """A model over ranks that has an encoder."""

    main_input_name: str

    def encode(self, inputs: Mapping[str, torch.Tensor | None]) -> EncoderOutput:
        """Run the encoder on all ranks."""


class EncoderStandIn(nn.Module):
    """Stands for the encoder of `model` where transformers asks for one; holds the model weakly, as its part would."""

    def __init__(self, model: EncodingModel) -> None:
        super().__init__()
        self._model_ref = weakref.ref(model)

    @property
    def main_input_name(self) -> str:
        """Return the name of what the encoder reads."""
        return self._model.main_input_name

    @property
    def _model(self) -> EncodingModel:
        model = self._model_ref()
        assert model is not None, "the model that this encoder belongs to is gone"
        return model

    def forward(self, **kwargs: Any) -> EncoderOutput:  # under this name generate hands on all that it has
        """Run the encoder on all ranks, and return the stand-in for its output."""
        if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
            raise AutodistError("the ranks' graphs give neither attentions nor hidden states: ask the model itself")
        return self._model.encode(kwargs)
