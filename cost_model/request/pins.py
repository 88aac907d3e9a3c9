"""Pins: roles that a user fixes for linears and embeddings by name; the search does the rest around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from cost_model.errors import PlanError
from cost_model.graph.op_graph import OpGraph
from cost_model.graph.roles import ROLES, role_of

Pin = tuple[str, str]  # (pattern, role)
NAMES_SHOWN = 3  # names that an error suggests in place of one that matches nothing


def roles_by_pin(graph: OpGraph, pin: Sequence[Pin]) -> dict[str, str]:
    """Returns op name -> role for every pinned op.

    A pattern is fnmatch's, over the module path or the name of an op that has roles (see roles.py); it may leave out
    how the path begins ("q_proj", "self_attn.*_proj"), and "..." means "*". Raises PlanError where a pattern matches
    nothing (naming the nearest), where a role is none of its op's, and where two patterns want the same op differently.
    """
    ops = [op for op in graph if role_of(op, "")]
    pin_of: dict[str, Pin] = {}
    for pattern, role in pin:
        matched = [op for op in ops if any(_matches(name, pattern) for name in (op.module, op.name))]
        if not matched:
            nearest = _nearest(pattern, [op.module for op in ops])
            raise PlanError(f"pin {pattern!r} matches no linear or embedding{nearest}")
        for op in matched:
            roles = (*ROLES[op.kind], "replicate")
            if role not in roles:
                raise PlanError(
                    f"pin {pattern!r}: {op.module or op.name} is {_article(op.kind)}, and has no role {role!r}: choose "
                    f"{', '.join(roles[:-1])} or {roles[-1]}"
                )
            before = pin_of.setdefault(op.name, (pattern, role))
            if before[1] != role:
                raise PlanError(
                    f"pins {before[0]!r} and {pattern!r} want {op.module or op.name} differently, {before[1]} and "
                    f"{role}: leave one out, or make its pattern narrower"
                )
    return {name: role for name, (_, role) in pin_of.items()}


def to_blame(pin: Sequence[Pin], fails: Callable[[Sequence[Pin]], bool]) -> list[Pin]:
    """Returns a minimal set of pins that together make a plan impossible: without any one of them a plan exists.

    Returns [] if no plan exists without pins either. `fails(some)` is True if no plan exists with these pins.
    """
    if fails(()):
        return []
    # A deletion filter, one search a pin: what remains impossible without a pin does not need that pin.
    kept = list(pin)
    for each in pin:
        fewer = [other for other in kept if other != each]
        if fails(fewer):
            kept = fewer
    return kept


def pin_text(pin: Sequence[Pin]) -> str:
    """Formats pins for an error: "'*.q_proj': column, 'lm_head': vocab"."""
    return ", ".join(f"{pattern!r}: {role}" for pattern, role in pin)


def nearest_names(name: str, names: Sequence[str]) -> list[str]:
    """Returns at most NAMES_SHOWN of `names`, those most like `name`; by their last parts where no whole is like it."""
    known = list(dict.fromkeys(names))
    close = get_close_matches(name, known, NAMES_SHOWN, 0.5)
    if close:
        return close
    lasts: dict[str, str] = {}
    for full in known:
        lasts.setdefault(full.rpartition(".")[2], full)
    last = name.rpartition(".")[2].strip("*")
    return [lasts[found] for found in get_close_matches(last, list(lasts), NAMES_SHOWN, 0.4)]


def _nearest(pattern: str, names: Sequence[str]) -> str:
    close = nearest_names(pattern, names)
    if close:
        return f"; the nearest: {', '.join(close)}"
    return f"; there are {', '.join(list(dict.fromkeys(names))[:NAMES_SHOWN])}, ..." if names else "; there is none"


def _matches(name: str, pattern: str) -> bool:
    pattern = pattern.replace("...", "*")
    return bool(name) and (fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}"))


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
