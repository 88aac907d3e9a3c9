"""Hypothesis strategies for plans."""

from hypothesis import strategies as st

from cost_model.graph.placement import PARTIAL, REPLICATE, Layout, intervals_of, shard
from cost_model.mesh import Mesh
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.data import HOP_CHANNELS, Alternative, CutOption, CutPlan, Hop, OpPlan, ParamPlan, StageSummary

names = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=8)
counts = st.integers(0, 2**50)
seconds = st.floats(0, 1e12, allow_nan=False)


@st.composite
def layouts(draw, tp):
    size = draw(st.integers(0, 12))
    owners = [draw(st.sets(st.integers(0, tp - 1), min_size=1)) for _ in range(size)]
    return Layout(size, tuple(intervals_of([i for i in range(size) if r in owners[i]]) for r in range(tp)))


@st.composite
def alternatives(draw):
    found = []
    for role in draw(st.lists(st.sampled_from(["column", "row", "replicate", "vocab"]), unique=True)):
        extra = draw(st.floats(-1, 1)), draw(st.integers(-(2**40), 2**40))
        found.append(Alternative(role, impossible=draw(names)) if draw(st.booleans()) else Alternative(role, *extra))
    return tuple(found)


@st.composite
def plans(draw):
    """Random plans that obey what plan.py says, and make no other sense."""
    tp, pp = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    lays = tuple(draw(st.lists(layouts(tp), max_size=3)))

    def stages():
        return tuple(sorted(draw(st.sets(st.integers(0, pp - 1), min_size=1))))

    def tensors():
        found = []
        for _ in range(draw(st.integers(0, 3))):
            kind = draw(st.sampled_from("RPS" if lays else "RP"))
            if kind == "S":
                found.append((shard(draw(st.integers(0, 4))), draw(st.integers(0, len(lays) - 1))))
            else:
                found.append((REPLICATE if kind == "R" else PARTIAL, -1))
        return tuple(p for p, _ in found), tuple(i for _, i in found)

    choices = tuple(draw(st.lists(alternatives(), max_size=3)))
    ops = []
    for i in range(draw(st.integers(0, 5))):
        choice = draw(st.integers(-1, len(choices) - 1))
        roles = [a.role for a in choices[choice] if not a.impossible] if choice >= 0 else []
        inputs, input_layouts = tensors()
        outputs, output_layouts = tensors()
        if all(i < 0 for i in input_layouts) and draw(st.booleans()):
            input_layouts = ()
        gather = tuple(draw(st.booleans()) and not p.is_replicate for p in outputs)
        at = stages()
        ops.append(OpPlan(
            f"op{i}", draw(names), draw(st.sampled_from(at)), at, inputs, outputs, gather, draw(names | st.just("")),
            draw(st.sampled_from(roles or ["", "column", "row", "vocab", "replicate"])), draw(names | st.just("")),
            draw(names | st.just("")), input_layouts, output_layouts, draw(seconds), draw(seconds), draw(counts),
            choice if roles else -1,
        ))  # fmt: skip
    params = []
    for i in range(draw(st.integers(0, 3))):
        shape = tuple(draw(st.lists(st.integers(0, 100), max_size=3)))
        placement, layout = REPLICATE, -1
        if lays and shape and draw(st.booleans()):
            dim, layout = draw(st.integers(0, len(shape) - 1)), draw(st.integers(0, len(lays) - 1))
            placement = shard(dim)
            shape = (*shape[:dim], lays[layout].size, *shape[dim + 1 :])
        params.append(ParamPlan(f"w{i}", shape, "float32", placement, layout, stages(), draw(st.booleans())))
    hops = []
    for op in ops:
        if op.outputs and pp > 1 and draw(st.booleans()):
            source = draw(st.integers(0, pp - 2))
            hops.append(Hop(
                op.name, draw(st.integers(0, len(op.outputs) - 1)), source, draw(st.integers(source + 1, pp - 1)),
                draw(st.integers(0, HOP_CHANNELS - 1)), draw(st.booleans()), draw(counts),
            ))  # fmt: skip
    summaries = [
        StageSummary(
            i, tuple(draw(st.lists(names, max_size=3))), draw(seconds), draw(seconds),
            tuple(op.name for op in ops if draw(st.booleans())), draw(seconds), draw(counts), draw(counts),
            draw(counts), draw(counts), tuple(draw(st.lists(st.tuples(names, counts, counts), max_size=3))),
        )
        for i in range(pp)
    ]  # fmt: skip
    cuts = ()
    if ops and draw(st.booleans()):
        at = st.sampled_from([op.name for op in ops])
        options = st.builds(CutOption, at, names, seconds, seconds, counts)
        found = [draw(st.lists(options, min_size=1, max_size=3)) for _ in range(pp - 1)]
        cuts = tuple(CutPlan(tuple(places), draw(st.integers(0, len(places) - 1))) for places in found)
    return PartitionPlan(
        Mesh(tp, pp), draw(names), draw(names), draw(names), draw(names),
        tuple(draw(st.dictionaries(names, counts, max_size=3)).items()), tuple(ops), tuple(params), lays, tuple(hops),
        tuple(summaries), draw(seconds), draw(counts), choices, cuts, tuple(draw(st.lists(names, max_size=2))),
    )  # fmt: skip
