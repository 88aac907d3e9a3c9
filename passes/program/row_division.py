"""RowDivision: whether a graph computes each row of a batch by itself, and where its inputs and outputs have rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RowDivision:
    """The rows of a graph, proven by passes/op_graph/divide_rows.py: run on some rows of a batch, the graph gives
    these rows of what it gives for the batch.

    `inputs` and `outputs` have, by name, the dim that counts the rows; an input or output without one is the same for
    all rows. `reason`: why the rows cannot be divided, in words; "" where they can.
    """

    inputs: Mapping[str, int] = field(default_factory=dict)
    outputs: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""


UNKNOWN = RowDivision(reason="nobody has followed the rows through this graph")
