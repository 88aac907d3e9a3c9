"""Asks a model how it counts the positions of a call that leaves them out.

    Llama, GPT-2, ...    0, 1, 2, ... in each row, whatever its values
    OPT, BioGPT          of the attention mask: 0 is at the first token that it shows
    RoBERTa and its like of the token ids: padding_idx + 1 is at the first that is no padding
    models of images     of the token ids, by Python: along height, width and time of the images among the tokens

The second and third kind count in tensor ops, which a graph of a call without positions has (`positions_of_values`).
The last looks at values as no graph can. So the model's own forward is run up to its language model, on a copy without
weights (`family_positions`).
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


def positions_of_values(model: Any) -> bool:
    """Return whether the model counts the positions of a call that leaves them out by the values of its tokens or its
    mask. `model` has no weights.

    It is run twice, with positions and without. Where it counts by values, it computes more integers of tokens and mask
    without. Both runs end alike where an op needs weights, which is behind the positions in either.
    """
    ids = torch.ones(1, 2, dtype=torch.long)
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    positions = torch.arange(2, device="meta")[None]  # where the embeddings are, of which models take the device
    without, told = _integer_ops(model, call), _integer_ops(model, call, position_ids=positions)
    return bool(without - told)


def _integer_ops(model: Any, call: Mapping[str, torch.Tensor], **positions: torch.Tensor) -> Counter[str]:
    """Return how often each op computes integers of tokens and mask in a forward, up to the first that fails."""
    given, parameters = {**call, **positions, "use_cache": False}, inspect.signature(model.forward).parameters.values()
    if not any(each.kind is each.VAR_KEYWORD for each in parameters):
        given = {each.name: given[each.name] for each in parameters if each.name in given}
    with _IntegerOps(*call.values()) as seen, torch.no_grad():
        with contextlib.suppress(Exception):  # whatever op, or Python, it is that takes no tensor without values
            model(**given)
    return seen.found


class _IntegerOps(TorchDispatchMode):
    """Counts the ops that compute integers, or truths, of some tensors, by name."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._computed = {id(tensor): tensor for tensor in tensors}  # held, so that no other gets its id

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if any(id(leaf) in self._computed for leaf in tree_leaves((args, kwargs))):
            for tensor in tree_leaves(outputs):
                if isinstance(tensor, torch.Tensor) and not tensor.is_floating_point():
                    self._computed[id(tensor)] = tensor
                    self.found[str(func)] += 1
        return outputs
