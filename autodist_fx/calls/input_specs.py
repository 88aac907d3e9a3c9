"""Reads the input specs of a call's tensors: dims in the size symbols of `input_shapes`, and dtypes.

A graph is traced for the specs of its inputs.

`attention_mask` may be [B, T] or, with a line for each query, [B, 1, S, T]; of booleans, integers or numbers to add:
each is another graph. Sizes that may differ are symbols, so that one graph serves any batch and any number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autodist_fx.calls.input_shapes import input_dims
from autodist_fx.calls.input_spec import Dims, InputSpec, parts_of
from autodist_fx.errors import AutodistError

# Whichever is there first says how many sequences and tokens there are.
_MAIN = (
    "input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "input_features", "input_values",
    "pixel_values",
)  # fmt: skip
# Other numbers of dims than input_shapes has, by name and number. "1|B": one for all sequences, or one for each; "*":
# any size, a constant of the graph; "*|B": one for each sequence, or a constant of the graph.
_OTHER_RANKS: dict[str, dict[int, Dims]] = {
    "attention_mask": {3: ("1|B", "1|S", "T"), 4: ("1|B", "*", "1|S", "T")},
    "decoder_attention_mask": {3: ("1|B", "1|S", "T"), 4: ("1|B", "*", "1|S", "T")},
    "position_ids": {1: ("S",), 2: ("1|B", "S"), 3: ("*", "1|B", "S")},
    "token_type_ids": {2: ("1|B", "S")},
    "labels": {1: ("B",), 2: ("B", "S")},
    "logits_to_keep": {1: ("K",)},
    "head_mask": {1: ("*",), 2: ("*", "*")},
}
_OF_CHOICES = ("input_ids", "attention_mask", "token_type_ids", "position_ids")  # a sequence for each choice
_LENGTHS = {
    "B": "sequences", "S": "tokens", "T": "tokens, with those in the cache", "E": "tokens that the encoder reads",
    "K": "positions",
}  # fmt: skip


def specs_of(inputs: Mapping[str, Any], model: ModelFacts, past: int) -> dict[str, InputSpec]:
    """The spec of each tensor among `inputs`, with `past` tokens in the cache.

    Errors: AutodistError, which names the input, what it is and what it ought to be.
    """
    lengths: dict[str, tuple[int, str]] = {}  # symbol -> the length, and the input that says so
    tensors = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    order = [name for name in _MAIN if name in tensors]
    order += [name for name in tensors if name not in order]
    specs = {}
    for name in order:
        dims, floating = _wanted(name, tensors[name], model)
        if floating and tensors[name].dtype != model.dtype:
            raise AutodistError(
                f"{name} is {_dtype(tensors[name].dtype)}, and the model's weights are {_dtype(model.dtype)}: convert "
                f"it with {name}.to(torch.{_dtype(model.dtype)})"
            )
        if name in ("input_ids", "position_ids", "token_type_ids") and tensors[name].is_floating_point():
            raise AutodistError(f"{name} is {_dtype(tensors[name].dtype)}: it should hold integers")
        specs[name] = InputSpec(_fitted(name, tuple(tensors[name].shape), dims, lengths, past), tensors[name].dtype)
    return specs


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The facts of a model that the specs of its inputs depend on."""

    config: Any
    has_encoder: bool
    embedding_dim: int
    dtype: torch.dtype
    choices: bool = False  # each input has several sequences for one answer


def constant_specs(inputs: Mapping[str, torch.Tensor], model: ModelFacts) -> dict[str, InputSpec]:
    """The specs of those inputs that nothing is known of (images, their sizes, ...), with every size a constant."""
    unknown = (name for name in inputs if input_dims(name, model.config, model.has_encoder) is None)
    return {name: InputSpec(tuple(inputs[name].shape), inputs[name].dtype) for name in unknown}


def _wanted(name: str, x: torch.Tensor, model: ModelFacts) -> tuple[Dims, bool]:
    """The dims that this input should have, and whether it holds the model's own numbers."""
    known = input_dims(name, model.config, model.has_encoder)
    if name == "labels" and x.dim() == 2 and (
        x.is_floating_point() or getattr(model.config, "problem_type", None) == "multi_label_classification"
    ):
        return ("B", "*"), False  # a number for each class
    others = _OTHER_RANKS.get(name, {})
    if model.choices and name in _OF_CHOICES:
        if x.dim() != 3:
            raise AutodistError(f"{name} is {list(x.shape)}: it should be [sequences, choices, tokens]")
        return ("B", "*", "S"), False
    if x.dim() in others and not (model.has_encoder and name in ("position_ids", "token_type_ids", "attention_mask")):
        return others[x.dim()], False
    if known is None:
        return ("*|B", *("*" for _ in range(x.dim() - 1))) if x.dim() else (), False
    dims, floating = known
    if x.dim() != len(dims):
        ranks = sorted({len(dims), *others})
        raise AutodistError(
            f"{name} is {list(x.shape)}, which has {x.dim()} dims: it should have {' or '.join(map(str, ranks))} "
            f"({_spelled(dims)})"
        )
    return tuple(model.embedding_dim or "*" if d == "D" else d for d in dims), floating


def _fitted(
    name: str, shape: tuple[int, ...], wanted: Dims, lengths: dict[str, tuple[int, str]], past: int
) -> Dims:
    """The dims with every choice made; notes new lengths. Raises AutodistError where one does not fit."""
    dims: list[str | int] = []
    for position, (size, want) in enumerate(zip(shape, wanted, strict=True)):
        if want == "*":
            dims.append(size)
            continue
        if isinstance(want, int):
            if size != want:
                raise AutodistError(f"{name} is {list(shape)}: dim {position} should be {want}")
            dims.append(want)
            continue
        one, _, dim = want.rpartition("|")
        symbol, times = parts_of(dim)
        length, source = _length(symbol, lengths, past)
        length = None if length is None else length * times
        if length is None and size % times == 0:
            lengths[symbol] = (size // times, name)
        elif size != length and (one == "*" or (one and size == 1)):
            dims.append(size)
            continue
        elif size != length:
            raise AutodistError(
                f"{name} is {list(shape)}: dim {position} should be {length or f'a multiple of {times}'} "
                f"({_LENGTHS.get(dim, dim)}), as {source or 'the model'} has it{', or 1' if one else ''}"
            )
        dims.append(dim)
    return tuple(dims)


def _length(symbol: str, lengths: Mapping[str, tuple[int, str]], past: int) -> tuple[int | None, str]:
    """Return the size that a symbol stands for in this call, and which input says so; None where none has said yet."""
    if symbol == "T" and "S" in lengths:
        length, source = lengths["S"]
        return length + past, source if not past else f"{source} with {past} tokens in the cache"
    return lengths.get(symbol, (None, ""))


def _spelled(dims: Dims) -> str:
    return "[" + ", ".join(_LENGTHS.get(str(d), str(d)) for d in dims) + "]"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
