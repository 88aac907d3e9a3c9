"""Reads fields of JSON objects strictly: each has a type and bounds, and an error gives the field's path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from math import isfinite
from typing import Any, TypeVar

from cost_model.errors import PlanError
from cost_model.graph.placement import PLACEMENTS, Layout, Placement
from cost_model.mesh import Mesh

T = TypeVar("T")
# Larger whole numbers are no real count or byte size, and would overflow where the plan is computed with.
INT_LIMIT = 2**63 - 1


class Fields:
    """A JSON object with typed access by key, and an error for every key that was never read.

    Every method raises PlanError with the field's path. A `default` makes the field optional.
    """

    __slots__ = ("_asked", "_path", "data")

    def __init__(self, data: Mapping[str, Any], path: str) -> None:
        self.data = data
        self._path = path
        self._asked: set[str] = set()

    def path(self, key: str) -> str:
        """Returns the path of a field, as errors name it: "ops[12].inputs"."""
        return f"{self._path}.{key}" if self._path else key

    def error(self, key: str, message: str) -> PlanError:
        """Returns an error about a field, for the caller to raise."""
        return PlanError(f"{self.path(key)}: {message}")

    def done(self) -> None:
        """Raises PlanError if the object has a field that was never read."""
        unknown = [key for key in self.data if key not in self._asked]
        if unknown:
            raise self.error(
                show(unknown[0], quote=False), f"unknown field; known are {', '.join(sorted(self._asked))}"
            )

    def _get(self, key: str) -> Any:
        self._asked.add(key)
        if key not in self.data:
            raise self.error(key, "missing")
        return self.data[key]

    def _read(self, key: str, default: T | None, convert: Callable[[Any, str], T]) -> T:
        if default is not None and key not in self.data:
            self._asked.add(key)
            return default
        return convert(self._get(key), self.path(key))

    def integer(self, key: str, low: int = 0, high: int = INT_LIMIT, default: int | None = None) -> int:
        """Reads a whole number from `low` to `high`."""
        return self._read(key, default, lambda value, path: integer_of(value, path, low, high))

    def number(self, key: str, signed: bool = False, default: float | None = None) -> float:
        """Reads a finite number, 0 or more unless `signed`."""
        return self._read(key, default, lambda value, path: number_of(value, path, signed))

    def text(self, key: str, default: str | None = None) -> str:
        """Reads a printable text."""
        return self._read(key, default, text_of)

    def flag(self, key: str) -> bool:
        return _flag(self._get(key), self.path(key))

    def items(self, key: str) -> list[Any]:
        return list_of(self._get(key), self.path(key))

    def object(self, key: str) -> Fields:
        """Reads an object, whose own fields the caller reads next."""
        value = self._get(key)
        if not isinstance(value, Mapping):
            raise self.error(key, f"expected an object, got {type_name(value)}")
        return Fields(value, self.path(key))

    def objects(self, key: str, convert: Callable[[Fields], T]) -> list[T]:
        """Reads a list of objects, each by `convert`."""
        found = []
        for i, value in enumerate(self.items(key)):
            if not isinstance(value, Mapping):
                raise self.error(f"{key}[{i}]", f"expected an object, got {type_name(value)}")
            found.append(convert(Fields(value, self.path(f"{key}[{i}]"))))
        return found

    def _each(self, key: str, default: tuple[T, ...] | None, convert: Callable[[Any, str], T]) -> tuple[T, ...]:
        return self._read(
            key,
            default,
            lambda value, path: tuple(convert(x, f"{path}[{i}]") for i, x in enumerate(list_of(value, path))),
        )

    def texts(self, key: str) -> tuple[str, ...]:
        return self._each(key, None, text_of)

    def integers(self, key: str, low: int = 0, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        return self._each(key, default, lambda x, path: integer_of(x, path, low, INT_LIMIT))

    def flags(self, key: str, default: tuple[bool, ...]) -> tuple[bool, ...]:
        return self._each(key, default, _flag)

    def placement(self, key: str) -> Placement:
        return _placement(self._get(key), self.path(key))

    def placements(self, key: str) -> tuple[Placement, ...]:
        return self._each(key, None, _placement)

    def stages(self, key: str, mesh: Mesh, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Reads one or more stages of the mesh, in ascending order."""
        stages = self._each(key, default, lambda x, path: integer_of(x, path, 0, mesh.pp - 1))
        if not stages or any(a >= b for a, b in pairwise(stages)):
            raise self.error(key, f"expected one or more stages in ascending order, got {list(stages)}")
        return stages

    def layout_indices(
        self, key: str, placements: tuple[Placement, ...], layouts: tuple[Layout, ...]
    ) -> tuple[int, ...]:
        """Reads a position in `layouts` for each placement: -1 for tensors that are not sharded, and for these only."""
        low_high = (-1, len(layouts) - 1)
        indices = self._each(key, (-1,) * len(placements), lambda x, path: integer_of(x, path, *low_high))
        sharded = any(placement.is_shard for placement in placements)
        if not sharded and not indices:  # OpPlan's default
            return indices
        if sharded and key not in self.data:
            raise self.error(key, "missing, and a tensor is sharded")
        if len(indices) != len(placements):
            raise self.error(key, f"{len(indices)} layouts for {len(placements)} tensors")
        for i, (placement, index) in enumerate(zip(placements, indices)):
            check_layout(self, f"{key}[{i}]", placement, index)
        return indices


def integer_of(value: Any, path: str, low: int, high: int) -> int:
    """Returns a whole number from `low` to `high`. Raises PlanError naming `path` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise PlanError(f"{path}: expected a whole number, got {show(value)}")
    if not low <= value <= high:
        bounds = f"{low} or more" if high == INT_LIMIT else f"{low} to {high}"
        raise PlanError(f"{path}: {show(value)} is out of range ({bounds})")
    return value


def number_of(value: Any, path: str, signed: bool = False) -> float:
    """Returns a finite number, 0 or more unless `signed`. Raises PlanError naming `path` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PlanError(f"{path}: expected a number, got {show(value)}")
    if not (abs(value) <= INT_LIMIT if isinstance(value, int) else isfinite(value)) or (value < 0 and not signed):
        least = "" if signed else ", 0 or more"
        raise PlanError(f"{path}: expected a finite number{least}, got {show(value)}")
    return float(value)


def text_of(value: Any, path: str) -> str:
    """Returns a printable text. Raises PlanError naming `path` for anything else."""
    if not isinstance(value, str):
        raise PlanError(f"{path}: expected a text, got {type_name(value)}")
    if not value.isprintable():  # would break lines, or drive the terminal, where the plan is printed
        raise PlanError(f"{path}: has characters that cannot be printed: {show(value)}")
    return value


def _flag(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise PlanError(f"{path}: expected true or false, got {show(value)}")
    return value


def list_of(value: Any, path: str) -> list[Any]:
    """Returns a list. Raises PlanError naming `path` for anything else."""
    if not isinstance(value, list | tuple):
        raise PlanError(f"{path}: expected a list, got {type_name(value)}")
    return list(value)


_PLACEMENTS: dict[str, Placement] = {}  # parsed already: a plan names the same few placements thousands of times


def _placement(value: Any, path: str) -> Placement:
    if not isinstance(value, str):
        raise PlanError(f"{path}: not a placement: {show(value)} (expected {PLACEMENTS})")
    found = _PLACEMENTS.get(value)
    if found is None:
        try:
            found = Placement.parse(value)
        except ValueError as error:
            raise PlanError(f"{path}: not a placement: {show(value)} (expected {PLACEMENTS})") from error
        # Refused are S(01) and digits of other scripts, which parse() takes; torch has at most 64 dims.
        if str(found) != value or (found.is_shard and found.dim > 63):
            raise PlanError(f"{path}: not a placement: {show(value)} (expected {PLACEMENTS})")
        _PLACEMENTS[value] = found
    return found


def type_name(value: Any) -> str:
    """Returns the JSON name of a value's type, for an error message."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def show(value: Any, quote: bool = True) -> str:
    """Formats a value for an error message: one short printable line, whatever it is."""
    if isinstance(value, dict | list) and len(value) > 4:
        return type_name(value)
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits; lists in lists in lists
        return type_name(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return text if quote else text.strip("'\"")


def check_owners(f: Fields, key: str, placements: tuple[Placement, ...], mesh: Mesh) -> None:
    """Raises PlanError if an O(rank) is of no tp rank of the mesh."""
    for placement in placements:
        if placement.is_owned and placement.dim >= mesh.tp:
            raise f.error(key, f"{placement} names no tp rank of {mesh}")


def check_layout(f: Fields, key: str, placement: Placement, layout: int) -> None:
    """Raises PlanError unless a tensor has a layout, a position of 0 or more, exactly if it is sharded."""
    if placement.is_shard and layout < 0:
        raise f.error(key, f"a tensor in {placement} needs a layout, not -1")
    if not placement.is_shard and layout >= 0:
        raise f.error(key, f"a tensor in {placement} has no layout; expected -1")
