"""Roles, the field's names of strategies: column, row, vocab, hidden, groups, expert, replicate."""

from __future__ import annotations

from cost_model.graph.op_graph import Op

EXPERT = "expert"  # the factor of a strategy that deals whole experts to the ranks
# Roles by kind of op, beside "replicate": the factors of its rule that have a name of their own in the field.
ROLES = {
    "linear": ("column", "row", EXPERT),
    "conv": ("column", "row", "groups", EXPERT),
    "experts": ("experts", "inner"),
    "embedding": ("vocab", "hidden"),
}


# Role -> its meaning, in a sentence that users read.
MEANING = {
    "column": "each tp rank makes its part of the outputs",
    "row": "each tp rank sums over its part of the inputs; the parts are added up",
    "vocab": "each tp rank looks up its part of the rows; the parts are added up",
    "hidden": "each tp rank has its part of every row",
    "groups": "each tp rank has its part of the channels' groups",
    "experts": "each tp rank has its part of the experts, each of them whole",
    "inner": "each tp rank has its part of the inside of every expert; the parts are added up",
    EXPERT: "each tp rank has its part of the experts, each of them whole",
    "replicate": "every tp rank does all of it",
}


def role_of(op: Op, factor: str) -> str:
    """Returns the role of `op` if `factor` of its rule is sharded ("" for none); "" for a kind without roles."""
    if op.kind not in ROLES:
        return ""
    return factor if factor in ROLES[op.kind] else "replicate"
