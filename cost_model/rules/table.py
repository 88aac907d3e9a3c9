"""The table of op rules, one for each kind: the dims of tensors that correspond, hence the ways to shard the op.

A rule lists *factors* (Shardy's word; an einsum's letters): coordinates that run through some dims of the inputs and
outputs. Sharding the op along a factor shards all of these together, and leaves an output that does not carry it either
impossible or, where the op sums over the factor, Partial. A dim that no factor names is never cut.

    linear      [d0 d1 row], [column row], [column] -> [d0 d1 column]  {sum: row}
    sdpa        [2 heads 3 8], [2 heads/3 5 8], [2 heads/3 5 8] -> [2 heads 3 8]
    embedding   [2 3], [vocab hidden] -> [2 3 hidden]  {sum: vocab}

Rules print in this form (`OpRule.__str__`): a number is a dim that is never cut, and a KV head (`heads/3`) goes with
three query heads. An op without a row is Replicate in and out: slower, never wrong.
tests/cost_model/rules/test_op_rules.py proves every row by running it on real shards; op_rules.txt beside it shows all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from cost_model.graph.op_graph import Op, TensorSpec
from cost_model.rules import convolutions, elementwise, indexing, losses, matmuls, random, reductions, views
from cost_model.rules.replicated import REPLICATED
from cost_model.rules.rule import OpRule, RuleFunction, Shape

T = TypeVar("T")


def one_table(**tables: Mapping[str, T]) -> dict[str, T]:
    """Merges tables, each given by the name of its file. Raises ValueError if two of them have a row of one name."""
    found: dict[str, T] = {}
    files: dict[str, str] = {}
    for file, table in tables.items():
        for name, row in table.items():
            if name in found:
                raise ValueError(f"{name!r} has a row in {files[name]}.py and another in {file}.py: leave out one")
            found[name], files[name] = row, file
    return found


RULES: dict[str, RuleFunction] = one_table(
    convolutions=convolutions.RULES,
    elementwise=elementwise.RULES,
    indexing=indexing.RULES,
    losses=losses.RULES,
    matmuls=matmuls.RULES,
    random=random.RULES,
    reductions=reductions.RULES,
    views=views.RULES,
)


def has_rule(kind: str) -> bool:
    """True if ops of the kind have a rule, or are whole on every rank on purpose, not for want of a rule."""
    return kind in RULES or kind in REPLICATED or kind.startswith("scalar.")


def plain_kind(kind: str) -> str:
    """Returns a kind's name in torch: "opaque.einsum" is an op graph's name for an einsum, which no handler knows."""
    return kind.removeprefix("opaque.")


class RuleTable:
    """The rules of ops, computed once per distinct (kind, shapes, attributes): the layers of a model share them."""

    def __init__(self) -> None:
        self._cache: dict[tuple[Any, ...], OpRule] = {}
        self._exact: dict[tuple[Any, ...], OpRule] = {}  # by example lengths, since each op is looked up several times

    def __call__(self, op: Op, inputs: Sequence[TensorSpec]) -> OpRule:
        """Returns the rule of `op` on inputs of these specs; one without factors for a kind without a row."""
        attributes = tuple(sorted(op.attrs.items()))
        exact = (op.kind, tuple(inputs), op.outputs, attributes)
        known = self._exact.get(exact)
        if known is None:
            known = self._exact[exact] = self._at_small_lengths(op, inputs, attributes)
        return known

    def _at_small_lengths(self, op: Op, inputs: Sequence[TensorSpec], attributes: tuple[Any, ...]) -> OpRule:
        shapes, outs = _with_small_lengths(tuple(inputs), op.outputs)
        key = (op.kind, shapes, outs, attributes)
        found = self._cache.get(key)
        if found is None:
            function = RULES.get(op.kind)
            found = OpRule() if function is None else function(shapes, outs, op.attrs)
            found = self._cache[key] = replace(found, inputs=shapes, outputs=outs)
        return found


def _with_small_lengths(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    """Returns the inputs' and outputs' shapes, with small primes that no other dim has as value-dependent lengths.

    Such lengths are never sharded, and their examples are huge and all different (each expert's rows): the rules of
    equal ops would not be shared, and their arrays would be as long.
    """
    specs = (*inputs, *outputs)
    value_dependent = {n: symbol for s in specs for n, symbol in zip(s.shape, s.symbols, strict=False) if "?" in symbol}
    small_of = {n: 0 for n, symbol in value_dependent.items() if "~" in symbol}
    if small_of:
        taken = {n for s in specs for n in s.shape}
        primes = (p for p in itertools.count(11, 2) if p not in taken and all(p % k for k in range(3, p, 2)))
        # Where a view divides the length into equal parts, the small length is a multiple of the number of parts, too.
        for n, prime in zip(sorted(small_of), primes):
            small_of[n] = prime * math.lcm(*(n // part for part in value_dependent if _is_part(part, n)))

    def small(spec: TensorSpec) -> Shape:
        if not small_of or not spec.symbols:
            return spec.shape
        shape = []
        for n, symbol in zip(spec.shape, spec.symbols, strict=True):
            whole = next((u for u in small_of if n % u == 0), None) if "?" in symbol else None
            part = next((u for u in small_of if _is_part(n, u)), None) if "?" in symbol else None
            if whole is not None:
                n = n // whole * small_of[whole]
            elif part is not None:
                n = small_of[part] // (part // n)
            shape.append(n)
        return tuple(shape)

    return tuple(map(small, inputs)), tuple(map(small, outputs))


def _is_part(part: int, whole: int) -> bool:
    """True if one length is a multiple of another, up to 1024 times: huge examples that are related by chance are not,
    and a batch has no more sequences."""
    return whole % part == 0 and whole <= 1024 * part

