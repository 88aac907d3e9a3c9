"""Writes the states of optimizers and schedulers as JSON, and reads them back: numbers, texts, lists and dicts."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import torch

from autodist_fx.errors import AutodistError

_TAG = "__kind__"


def to_plain(value: Any, where: str) -> Any:
    """Return a value that JSON can hold, for `from_plain`. Raises AutodistError, which names `where`, for what it
    cannot."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        return value.item()
    if isinstance(value, tuple):
        return {_TAG: "tuple", "of": [to_plain(each, where) for each in value]}
    if isinstance(value, list):
        return [to_plain(each, where) for each in value]
    if isinstance(value, Mapping):
        kind = "Counter" if isinstance(value, collections.Counter) else "dict"
        if kind == "dict" and all(isinstance(key, str) for key in value) and _TAG not in value:
            return {key: to_plain(each, f"{where}[{key!r}]") for key, each in value.items()}
        pairs = [[to_plain(key, where), to_plain(each, f"{where}[{key!r}]")] for key, each in value.items()]
        return {_TAG: kind, "of": pairs}
    raise AutodistError(f"{where} is a {type(value).__name__}, which is no number, text, list or dict: it is not saved")


def from_plain(value: Any) -> Any:
    """Return what `to_plain` was given; a tensor of one number comes back as that number."""
    if isinstance(value, list):
        return [from_plain(each) for each in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TAG)
    if kind is None:
        return {key: from_plain(each) for key, each in value.items()}
    if kind == "tuple":
        return tuple(from_plain(each) for each in value["of"])
    pairs = {from_plain(key): from_plain(each) for key, each in value["of"]}
    return collections.Counter(pairs) if kind == "Counter" else pairs
