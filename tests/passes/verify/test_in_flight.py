"""verify_in_flight: microbatches of a model that runs may follow each other; a message that is lost is named."""

from __future__ import annotations

import pytest

from cost_model.errors import VerificationError
from passes.ops.comm import recv, send
from passes.verify.schedule import verify_in_flight
from tests.support.graphs.broken_programs import calls
from tests.support.training.stage_programs import CHAIN, SKIPS, stage_programs


@pytest.mark.parametrize("values", [CHAIN, SKIPS, SKIPS[::-1]], ids=["chain", "two stages on", "latest first"])
@pytest.mark.parametrize("tp", [1, 2])
def test_programs_of_a_chain_are_proven(tp: int, values: tuple[tuple[int, int], ...]) -> None:
    verify_in_flight(stage_programs(tp, 4, values, gradient=False))


def test_a_lost_message_is_named() -> None:
    programs = stage_programs(2, 4, gradient=False)
    node = calls(programs[2], recv)[0]
    node.replace_all_uses_with(next(n for n in node.graph.nodes if n.op == "placeholder"))
    node.graph.erase_node(node)
    message = (
        r"rank 0 \(tp rank 0\) waits behind 0F0 for rank 1 \(tp rank 0\) to receive from_0_to_1 \(channel 0, "
        r"microbatch 0\)"
    )
    with pytest.raises(VerificationError, match=message):
        verify_in_flight(programs)
    programs = stage_programs(2, 4, gradient=False)
    node = calls(programs[1], send)[0]
    node.graph.erase_node(node)
    with pytest.raises(VerificationError, match=r"rank 1 \(tp rank 1\) waits at 1F0 for from_0_to_1 .* from rank 0 "):
        verify_in_flight(programs)
