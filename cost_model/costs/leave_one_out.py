"""Tells how well tables predict what they have no point for: each point of a table, left out, from its neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from cost_model.costs.compute import table_bound
from cost_model.costs.hardware import Hardware
from cost_model.costs.tables import Table


def left_out_errors(machine: Hardware) -> Iterator[tuple[int, Table, float]]:
    """Yields (ranks that computed at once, table, error) of each point with neighbours on both sides of some axis.

    Errors are relative to what was measured. Between two neighbours lies twice the distance that sizes in between have
    to a measured point: predictions of plans are nearer.
    """
    assert machine.measured is not None
    for run in machine.measured.runs:
        for table in run.tables:
            bound = table_bound(table, machine)
            for at in product(*(range(len(axis)) for axis in table.axes)):
                predicted = table.left_out(at, bound)
                if predicted is not None:
                    yield run.ranks, table, abs(predicted / table.at(at) - 1)
