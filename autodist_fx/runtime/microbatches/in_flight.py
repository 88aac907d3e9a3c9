"""Decides, alike on all ranks, into how many microbatches a call without a cache is divided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autodist_fx.calls.call import Call
from autodist_fx.runtime.microbatches.count import Microbatches
from autodist_fx.runtime.microbatches.divided_call import divided, rows_of
from autodist_fx.runtime.microbatches.forecast import StageSeconds, by_rows
from cost_model.schedule.fill import Filling
from passes.program.row_division import RowDivision

_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


@dataclass(frozen=True, slots=True)
class InFlight:
    """How a call was run: in `count` microbatches, and why; with "auto" also what was predicted."""

    count: int
    why: str
    filling: Filling | None = None


def divided_call(
    call: Call,
    division: RowDivision,
    serves: Callable[[Call], bool],
    stage_seconds: StageSeconds,
    wanted: Microbatches,
    stages: int,
) -> tuple[list[Call], InFlight]:
    """Return the microbatches of a call, in order, and why they are as many.

    `division` is of the call's program, `serves` says for which other calls that is; `stage_seconds` is asked where
    `wanted` is "auto".
    """
    if stages == 1 or wanted == 1:
        return [call], InFlight(1, "one stage" if stages == 1 else "as asked for")
    rows = rows_of(call, division)
    if rows == 1:
        return [call], InFlight(1, division.reason or "one row")
    if wanted == "auto":
        filling = by_rows(stage_seconds, _sizes(call, rows))
        chosen = InFlight(filling.count, str(filling), filling)
    else:
        chosen = InFlight(min(wanted, rows), "as asked for")
    parts = divided(call, division, chosen.count)
    if chosen.count > 1 and not all(serves(part) for part in parts):
        return [call], InFlight(1, "a part of the batch would take another graph than the whole")
    return parts, chosen


def _sizes(call: Call, rows: int) -> dict[str, int]:
    """Return the lengths of a call by size symbol, as far as its stages' seconds depend on them."""
    tokens = next((x for name in _TOKENS if (x := call.tensors.get(name)) is not None), None)
    sizes = {"B": rows, "P": 0}
    if tokens is not None and tokens.dim() > 1:
        sizes["S"] = tokens.shape[1]
    read = call.tensors.get("input_ids") if "decoder_input_ids" in call.tensors else None
    if read is not None:
        sizes["E"] = read.shape[1]
    return sizes
