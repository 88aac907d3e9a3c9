"""Correct programs, none of which verify may refuse: all subjects, and random modules by random plans."""

from __future__ import annotations

import random

import torch

from autodist_fx.numeric.check import CheckedVariant, check_call, drawn_weights
from cost_model.errors import MeshError, VerificationError
from passes.op_graph.build import build_op_graph, parameter_names
from passes.partition.pipeline import emit_rank
from passes.verify.verify import verify
from tests.mutations.subjects import subject, subjects
from tests.mutations.trial import numeric_verdict, static_verdict
from tests.support.graphs.random_models import RandomModule, random_costs
from tests.support.graphs.small import FREE, normalized, plan_for


def correct_programs(count: int) -> tuple[int, list[str]]:
    """(how many were looked at, what was said of each that was refused). All families by all meshes first."""
    alarms = []
    known = subjects()[:count]
    for which in known:
        made = subject(*which)
        programs = made.programs()
        for name, verdict in (("static", static_verdict(made, programs)), ("numeric", numeric_verdict(made, programs))):
            if verdict:
                alarms.append(f"{made}, {name}: {verdict}")
    for seed in range(count - len(known)):
        refused = _random_module(seed)
        if refused:
            alarms.append(f"random module {seed}: {refused}")
    return max(count, len(known)), alarms


def _random_module(seed: int) -> str:
    """Returns what verify says of a random module by a random plan, statically and in numbers."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    module = RandomModule(seed, steps=rng.choice([8, 12, 20])).double().eval()
    whole = normalized(module, x=("B", "S", module.width))
    for pp in (rng.choice([1, 2]), 1):  # where there are too few places to cut, one stage
        try:
            with random_costs(seed):
                plan = plan_for(whole, rng.randint(2, 4), pp, FREE)
            break
        except MeshError:
            continue
    programs = [emit_rank(whole, plan, rank) for rank in range(plan.mesh.size)]
    checked = CheckedVariant(whole, parameter_names(whole), plan, programs, ())
    try:
        verify(programs, plan, build_op_graph(whole), whole)
        check_call(checked, drawn_weights(checked, {}), {"x": torch.randn(2, 5, module.width, dtype=torch.float64)})
    except VerificationError as error:
        return str(error)
    return ""
