"""The tables of handlers by the name of a call, and the kinds of op that they may emit.

A kind that a handler can emit and that no rule names would be replicated without a word: that is an error at import.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from cost_model.rules.replicated import REPLICATED
from cost_model.rules.table import RULES, one_table
from passes.op_graph import convolutions, elementwise, indexing, losses, matmuls, random, reductions, views
from passes.op_graph.handlers import Handler, ModuleHandler

# By the name of a function or a method, as `op_name` gives it.
HANDLERS: dict[str, Handler] = one_table(
    convolutions=convolutions.HANDLERS,
    elementwise=elementwise.HANDLERS,
    indexing=indexing.HANDLERS,
    losses=losses.HANDLERS,
    matmuls=matmuls.HANDLERS,
    random=random.HANDLERS,
    reductions=reductions.HANDLERS,
    views=views.HANDLERS,
)
# By the name of a module's class.
MODULES: dict[str, ModuleHandler] = one_table(
    convolutions=convolutions.MODULES,
    elementwise=elementwise.MODULES,
    matmuls=matmuls.MODULES,
    reductions=reductions.MODULES,
)
# What the handlers of each file can emit.
KINDS: dict[str, tuple[str, ...]] = {
    "convolutions": convolutions.KINDS,
    "elementwise": elementwise.KINDS,
    "indexing": indexing.KINDS,
    "losses": losses.KINDS,
    "matmuls": matmuls.KINDS,
    "random": random.KINDS,
    "reductions": reductions.KINDS,
    "views": views.KINDS,
}


def check_kinds(kinds: Mapping[str, Collection[str]], rules: Collection[str], replicated: Collection[str]) -> None:
    """Raises ImportError naming every kind, by the file that emits it, which has neither a rule nor a place among
    the kinds that are replicated on purpose."""
    lost = {file: [kind for kind in own if kind not in rules and kind not in replicated] for file, own in kinds.items()}
    if any(lost.values()):
        named = "; ".join(f"passes/op_graph/{file}.py emits {', '.join(own)}" for file, own in lost.items() if own)
        raise ImportError(
            f"{named}: no rule says how such ops are sharded; add a row to cost_model/rules, or, where they are to be "
            f"computed whole on every rank, to REPLICATED in cost_model/rules/replicated.py"
        )


check_kinds(KINDS, RULES, REPLICATED)
