"""Checks that what one program leaves in the cache is what another reads there: the same pieces, on the same ranks."""

from __future__ import annotations

from collections.abc import Sequence

from cost_model.graph.op_graph import OpGraph
from cost_model.plan.data import PlanData
from passes.program.rank_program import RankProgram
from passes.verify.core.report import Duty, fail_plainly, on_rank


def verify_handover(
    writers: Sequence[RankProgram],
    written: tuple[PlanData, OpGraph],
    readers: Sequence[RankProgram],
    read: tuple[PlanData, OpGraph],
) -> None:
    """Checks that `readers` find in the cache what `writers` leave there; each are the programs of ranks 0, 1, ...,
    verified for their own plan and graph.

    Raises VerificationError.
    """
    lies = _layers(*written, "cache_update")
    for layer, wanted in _layers(*read, "cache_read").items():
        found = lies.get(layer)
        if found != wanted:
            fail_plainly(f"cache layer {layer} is written as {found}, and read as {wanted}", Duty.ENCODER)
    reads = {op.attrs["layer"] for op in read[1] if op.kind == "cache_read"}
    for writer, reader in zip(writers, readers, strict=True):
        lost = [layer for layer in reader.cache_layers if layer in reads and layer not in writer.cache_layers]
        if lost:
            fail_plainly(
                f"{on_rank(reader)} reads cache layer {lost[0]}, which is written on another rank",
                Duty.ENCODER,
            )


def _layers(plan: PlanData, graph: OpGraph, kind: str) -> dict[int, tuple[object, ...]]:
    """Returns, for each cache layer, how its keys and values lie, as values to compare."""
    found: dict[int, tuple[object, ...]] = {}
    for op in graph:
        if op.kind == kind:
            planned = plan.op(op.name)
            layouts = tuple(plan.layout(index) for index in planned.output_layouts)
            found[op.attrs["layer"]] = (planned.outputs, layouts, op.outputs)
    return found
