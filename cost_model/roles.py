"""What a strategy is called in the field's words: column, row, vocab, hidden, groups, replicate."""

from __future__ import annotations

from cost_model.op_graph import Op

# What an op of a kind may be beside "replicate": the letters of its rule that have a name of their own.
ROLES = {"linear": ("column", "row"), "conv": ("column", "row", "groups"), "embedding": ("vocab", "hidden")}


def role_of(op: Op, letter: str) -> str:
    """The role of `op` where `letter` of its rule is sharded ("" for none); "" for an op of a kind without roles."""
    if op.kind not in ROLES:
        return ""
    return letter if letter in ROLES[op.kind] else "replicate"
