"""Asks a model of images which positions it gives its language model, for a call that leaves them out.

Such models count along height, width and time of the images among the tokens, by Python that looks at the token ids,
which no graph can hold. So the model's own forward is run up to its language model, on a copy without weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


class _Asked(Exception):
    """Ends a forward at its language model, with the positions that it gives it."""

    def __init__(self, positions: torch.Tensor | None) -> None:
        super().__init__()
        self.positions = positions


def counts_positions(model: nn.Module) -> bool:
    """Return whether a module of the model keeps how far its positions are from the number of tokens: it counts them
    of the values of token ids."""
    return any("rope_deltas" in vars(module) for module in model.modules())


def family_positions(model: Any, given: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the positions that the model gives its language model for a call with the arguments `given`, among them
    input_ids [batch, tokens]; None where it leaves them to that. `model` has no weights, and keeps what it counted for
    the calls that go on with this one's cache."""
    inputs = {name: value for name, value in given.items() if not _is_media(value)}
    with _ending_at_language_model(model), torch.no_grad():
        try:
            model(**inputs)
        except _Asked as asked:
            return asked.positions
    raise AssertionError("a model of images calls its language model")


def _is_media(value: Any) -> bool:
    """Return whether this is an image, or a sound: numbers, which no position depends on."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@contextlib.contextmanager
def _ending_at_language_model(model: Any) -> Iterator[None]:
    """Let a forward of `model` embed tokens without a table, and end at its language model."""

    def embed(ids: torch.Tensor) -> torch.Tensor:
        return torch.empty(*ids.shape, 1)

    def end(*args: Any, **kwargs: Any) -> None:
        raise _Asked(kwargs.get("position_ids"))

    embeddings, decoder = model.get_input_embeddings(), model.get_decoder()
    vars(embeddings)["forward"], vars(decoder)["forward"] = embed, end
    try:
        yield
    finally:
        del vars(embeddings)["forward"], vars(decoder)["forward"]
