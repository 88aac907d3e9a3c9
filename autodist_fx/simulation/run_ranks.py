"""Runs every rank's program, in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autodist_fx.calls.lengths import tokens_of
from autodist_fx.simulation.thread_communicator import ThreadCommunicator, ThreadWorld
from passes.ops.comm import using
from passes.program.rank_program import RankProgram


def simulate(programs: Sequence[RankProgram], inputs_per_rank: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Run the programs of a whole mesh against each other; return each rank's outputs, by rank.

    `inputs_per_rank[r]` are rank r's inputs by name: the same tensors for all, but a cache of its own for each; an
    input that a graph does not take is left out. Runs under the caller's grad mode. Raises what a rank raised, with a
    note that names the rank; DeadlockError; CommunicationError.
    """
    ranks = [program.rank for program in programs]
    mesh = programs[0].mesh if programs else None
    if mesh is None or ranks != list(range(mesh.size)):
        raise ValueError(f"simulate needs the programs of ranks 0, 1, ... of one mesh, in order; got ranks {ranks}")
    if len(inputs_per_rank) != len(programs):
        raise ValueError(f"simulate got {len(programs)} programs and inputs for {len(inputs_per_rank)} ranks")

    def run_rank(rank: int, communicator: ThreadCommunicator) -> dict[str, Any]:
        program, inputs = programs[rank], inputs_per_rank[rank]
        with using(communicator):
            outputs = program.graph_module(**{name: inputs[name] for name in program.input_names if name in inputs})
        if program.length_kinds:
            inputs["past_key_values"].count(tokens_of(inputs))
        return outputs

    return ThreadWorld(mesh).run(run_rank)
