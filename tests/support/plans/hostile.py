"""Plans whose every name is an attack or a nuisance, as a file from a stranger may be."""

from __future__ import annotations

from dataclasses import replace

from cost_model.partition_plan import PartitionPlan
from cost_model.plan.data import Device, Request
from tests.support.plans.examples import small_plan

HACK = "document.title='hacked'"
ATTACK = f"</script><script>{HACK}</script><img src=x onerror=\"{HACK}\">'\"&lt;[red]\\N"


def hostile_plan() -> PartitionPlan:
    """A small plan, all of whose texts end in ATTACK."""
    plan = small_plan()

    def bad(text: str) -> str:
        return text + ATTACK if text else text

    return replace(
        plan,
        model=bad(plan.model),
        hardware=bad(plan.hardware),
        objective=bad(plan.objective),
        fingerprint=ATTACK + plan.fingerprint,
        sizes=tuple((bad(symbol), length) for symbol, length in plan.sizes),
        ops=tuple(
            replace(op, name=bad(op.name), kind=bad(op.kind), module=bad(op.module), weight=bad(op.weight),
                    role=bad(op.role), factor=bad(op.factor)) for op in plan.ops
        ),
        params=tuple(replace(p, name=bad(p.name), dtype=bad(p.dtype)) for p in plan.params),
        hops=tuple(replace(hop, op=bad(hop.op)) for hop in plan.hops),
        stages=tuple(
            replace(s, layers=tuple(map(bad, s.layers)), recomputed=tuple(map(bad, s.recomputed)),
                    collectives=tuple((bad(name), n, b) for name, n, b in s.collectives)) for s in plan.stages
        ),
        choices=tuple(
            tuple(replace(a, role=bad(a.role), impossible=bad(a.impossible)) for a in choice) for choice in plan.choices
        ),
        cuts=tuple(
            replace(cut, options=tuple(replace(o, op=bad(o.op), module=bad(o.module)) for o in cut.options))
            for cut in plan.cuts
        ),
        request=Request(((ATTACK, ATTACK),), (ATTACK,), (), (Device(ATTACK, 1), Device("x" + ATTACK, 2))),
        warnings=(ATTACK,),
    )  # fmt: skip


def enormous_plan(layers: int = 10_000) -> PartitionPlan:
    """That many layers of which no two have a pattern in common, with names of 500 characters, and many warnings."""
    plan = small_plan()
    linear = next(op for op in plan.ops if op.role == "column")
    weight = next(p for p in plan.params if p.name == linear.weight)
    names = [f"{'a&b<c' * 98}_{i:05d}_" for i in range(layers)]
    return replace(
        plan,
        ops=plan.ops + tuple(
            replace(linear, name=f"op_{name}", module=name, weight=name + ".weight", home=1, stages=(1,))
            for name in names
        ),
        params=plan.params + tuple(replace(weight, name=name + ".weight", stages=(1,)) for name in names),
        stages=tuple(
            replace(s, layers=s.layers + tuple(names), recomputed=tuple(op.name for op in plan.ops) * 300)
            for s in plan.stages
        ),
        warnings=tuple("!" * 1000 + str(i) for i in range(5000)),
    )  # fmt: skip
