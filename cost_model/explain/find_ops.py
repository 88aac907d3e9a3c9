"""Finds the ops that a user means by a name: an op, a module's path, the end of one, or a pattern with stars."""

from __future__ import annotations

from difflib import get_close_matches
from fnmatch import fnmatchcase

from cost_model.errors import PlanError
from cost_model.format import name_pattern
from cost_model.plan.data import OpPlan, PlanData

SHOWN = 6  # names listed in an error
# passes/partition/fuse_ops.py names the op that replaces a chain by this and the name of the chain's last op
FUSED = "fused_"


def find_ops(plan: PlanData, name: str) -> list[OpPlan]:
    """Returns one or more ops, in the plan's order: several are the same op of different layers, or all of one module.

    If ops of a module have roles, only these are returned. Raises PlanError where no op or module has the name, naming
    the nearest, and where several different modules have it, naming these.
    """
    for own in (name, name.removeprefix(FUSED)):
        if plan.has_op(own):
            return [plan.op(own)]
    found = [op for op in plan.ops if name and op.module == name] or [
        op for op in plan.ops if any(_means(name, text) for text in (op.name, op.module))
    ]
    found = [op for op in found if op.role] or found
    if not found:
        raise PlanError(_unknown(plan, name))
    modules = list(dict.fromkeys(name_pattern(op.module) for op in found))
    if len(modules) > 1:
        raise PlanError(f"{name!r} means ops of {len(modules)} modules: {_listed(modules)}; name one of them")
    return found


def _means(name: str, text: str) -> bool:
    return bool(text) and (fnmatchcase(text, name) or fnmatchcase(text, f"*.{name}"))


def _unknown(plan: PlanData, name: str) -> str:
    modules = list(dict.fromkeys(op.module for op in plan.ops if op.module))
    inside = [module for module in modules if name and f".{name}." in f".{module}"]
    if inside:
        patterns = list(dict.fromkeys(map(name_pattern, inside)))
        shown = patterns if len(patterns) < len(inside) else inside  # layers that are alike once
        return f"{name!r} runs no op itself; inside it are {_listed(shown)}"
    known = dict.fromkeys([*map(name_pattern, modules), *(m.rpartition(".")[2] for m in modules), *modules])
    known.update(dict.fromkeys(op.name for op in plan.ops))
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`autodist-fx show` lists the modules"
    return f"no op or module of {plan.model} is called {name!r}: {hint}"


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
