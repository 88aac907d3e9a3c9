"""Kinds of op that have no rule on purpose: every rank computes them whole, and a rule would save nothing."""

from __future__ import annotations

_CHOICE = "decides where data goes: what it reads is whole on every rank in any case (cost_model/layouts/routing.py)"
_DRAWN = "has a number for each sequence, as a rule (stochastic depth): what reads it takes its own part"
_FILL = "reads a shape and a dtype, and no values"

# Kind -> why. "opaque.<name>" is what an op graph calls an op of torch's that no handler knows.
REPLICATED: dict[str, str] = {
    "opaque.topk": _CHOICE, "opaque.sort": _CHOICE, "opaque.argsort": _CHOICE, "opaque.one_hot": _CHOICE,
    "opaque.selected": _CHOICE, "opaque.bincount": _CHOICE, "opaque.histc": _CHOICE,
    "opaque.seeded_uniform": _DRAWN,
    "opaque.nonzero_static": _CHOICE,
    "opaque.zeros_like": _FILL, "opaque.ones_like": _FILL, "opaque.full_like": _FILL, "opaque.empty_like": _FILL,
    "opaque.new_zeros": _FILL, "opaque.new_ones": _FILL, "opaque.new_full": _FILL, "opaque.new_empty": _FILL,
}  # fmt: skip
# The kinds among these that read no values, so that what is made of them alone depends on no weights.
FILLS = frozenset(kind for kind, why in REPLICATED.items() if why is _FILL)
