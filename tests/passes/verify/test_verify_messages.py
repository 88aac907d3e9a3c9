"""verify: Messages, collectives and deadlocks that are wrong are refused, with the rank, the node and the reason."""

from __future__ import annotations

import pytest
import torch

from passes.ops.comm import all_gather, all_reduce, recv, send
from tests.support.graphs.broken_programs import (
    BrokenPrograms,
    Programs,
    add_after,
    bypass,
    calls,
    check_refused,
    comms,
    with_argument,
    with_keyword,
)

broken = BrokenPrograms()

# -- messages ----------------------------------------------------------------------------------------------------------


@broken("llama", 2, 2, r"rank 1 .*send.*never receives it: channel 0 is none of those between ranks 1 and 3, \[5\]")
def recv_lost(programs: Programs) -> None:
    node = calls(programs[3], recv)[0]
    with_keyword(node, channel=5)


@broken("llama", 2, 2, r"rank 3 .*recv.*rank 1 never sends it")
def send_lost(programs: Programs) -> None:
    node = calls(programs[1], send)[0]
    node.graph.erase_node(node)


@broken("gpt2", 2, 2, r"rank 0 .*send.*rank 3 never receives it: .* from rank 0 to rank 2, rank 1 to rank 3 there")
def send_to_the_wrong_peer(programs: Programs) -> None:
    with_keyword(calls(programs[0], send)[0], to=3)


@broken("gpt2", 2, 2, r"rank 1 .*send.*rank 3 never receives it: channel 0 goes from rank 0 to rank 2")
def recv_from_the_wrong_peer(programs: Programs) -> None:
    with_keyword(calls(programs[3], recv)[0], source=0)


@broken("gpt2", 2, 2, r"rank 0 .*the plan sends nothing on channel 0 from rank 0 to rank 3")
def peers_crossed_on_both_sides(programs: Programs) -> None:
    for sender, target in ((0, 3), (1, 2)):
        with_keyword(calls(programs[sender], send)[0], to=target)
        with_keyword(calls(programs[target], recv)[0], source=sender)


@broken("llama", 1, 2, r"peer 9 is no other rank of the mesh")
def peer_that_is_not_there(programs: Programs) -> None:
    with_keyword(calls(programs[0], send)[0], to=9)


@broken("llama", 1, 2, r"channel 0 from rank 0 to rank 1 is used twice")
def channel_used_twice(programs: Programs) -> None:
    for program, target in zip(programs, (send, recv), strict=True):
        node = calls(program, target)[0]
        add_after(node, target, node.args, dict(node.kwargs))


@broken("llama", 1, 2, r"rank 1 .*recv.* waits for channel 7 where rank 0 sends channel 0")
def sends_swapped(programs: Programs) -> None:
    first = calls(programs[0], send)[0]
    add_after(first, send, first.args, {"to": 1, "channel": 7})
    wanted = calls(programs[1], recv)[0]
    extra = add_after(wanted, recv, wanted.args, {"source": 0, "channel": 7})
    wanted.prepend(extra)


@broken("llama", 1, 2, r"rank 0 .*the plan sends nothing on channel 7")
def message_that_is_not_planned(programs: Programs) -> None:
    first = calls(programs[0], send)[0]
    add_after(first, send, first.args, {"to": 1, "channel": 7})
    wanted = calls(programs[1], recv)[0]
    add_after(wanted, recv, wanted.args, {"source": 0, "channel": 7})


@broken("llama", 1, 2, r"never sends .*which the plan sends to rank 1 on channel 0")
def hop_left_out_on_both_sides(programs: Programs) -> None:
    sending = calls(programs[0], send)[0]
    sending.graph.erase_node(sending)
    wanted = calls(programs[1], recv)[0]
    stand_in = next(n for n in wanted.graph.nodes if n.op == "placeholder")
    wanted.replace_all_uses_with(stand_in)
    wanted.graph.erase_node(wanted)


@broken("opt", 2, 2, r"rank 2 .*recv.* waits for torch.float16 and gets torch.float32 from rank 0")
def recv_of_another_dtype(programs: Programs) -> None:
    with_argument(calls(programs[2], recv)[0], 1, torch.float16)


@broken("llama", 2, 2, r"rank 2 .*recv.*waits for 47 elements in dim 2, and rank 0 sends float32\[11, 23, 48\]")
def recv_of_another_shape(programs: Programs) -> None:
    node = calls(programs[2], recv)[0]
    with_argument(node, 0, (*node.args[0][:2], 47))


@broken("llama", 2, 2, r"rank 2 .*recv.*dim 0 of what comes is B, and this waits for 11: that follows the inputs")
def recv_of_the_example_length(programs: Programs) -> None:
    node = calls(programs[2], recv)[0]
    with_argument(node, 0, (11, *node.args[0][1:]))


@broken("llama", 2, 2, r"rank 2 .*recv.*waits for 23 elements in dim 0")
def recv_with_lengths_swapped(programs: Programs) -> None:
    for program in programs[2:]:
        node = calls(program, recv)[0]
        batch, seq, size = node.args[0]
        with_argument(node, 0, (seq, batch, size))


@broken("llama", 1, 2, r"rank 0 .*sends .* on channel 0, where the plan sends")
def cut_too_early(programs: Programs) -> None:
    """The residual before the last block, which has the same shape."""
    node = calls(programs[0], send)[0]
    with_argument(node, 0, node.args[0].args[0])


# -- deadlocks ---------------------------------------------------------------------------------------------------------


@broken("llama", 1, 2, r"wait for each other for ever: .*rank 0: .*recv.* -> .*rank 1")
def answer_before_the_question(programs: Programs) -> None:
    """Rank 0 waits, before it sends, for what rank 1 sends after it has received."""
    sending, wanted = calls(programs[0], send)[0], calls(programs[1], recv)[0]
    answer = add_after(sending, recv, wanted.args[:2] + ("cpu",), {"source": 1, "channel": 9})
    answer.args = ((1, 1, 48), torch.float32, "cpu")
    sending.prepend(answer)
    add_after(wanted, send, (wanted,), {"to": 0, "channel": 9})


@broken("llama", 2, 1, r"wait for each other for ever: .*ranks 0, 1: all_reduce")
def message_around_a_collective(programs: Programs) -> None:
    """Rank 0 waits before the collective for what rank 1 sends behind it."""
    before, behind = calls(programs[0], all_reduce)[0], calls(programs[1], all_reduce)[0]
    waits = add_after(before, recv, ((1, 1, 48), torch.float32, "cpu"), {"source": 1, "channel": 9})
    before.prepend(waits)
    add_after(behind, send, (behind,), {"to": 0, "channel": 9})


# -- collectives -------------------------------------------------------------------------------------------------------


@broken("llama", 2, 1, r"rank 1 .*comes to .*all_reduce.* one of them is missing or too many")
def collective_dropped_on_one_rank(programs: Programs) -> None:
    bypass(calls(programs[1], all_reduce)[1])


@broken("llama", 3, 1, r"rank 0 .*all_gather.*rank 2 never comes to this collective: the ranks would hang")
def last_collective_dropped_on_one_rank(programs: Programs) -> None:
    bypass(comms(programs[2])[-1])


@broken("gpt2", 2, 1, r"rank 1 .*rank 0 comes to all_reduce.* of add_1 at this point, .* missing or too many")
def collective_twice_on_one_rank(programs: Programs) -> None:
    node = calls(programs[0], all_reduce)[0]
    add_after(node, all_reduce, node.args, dict(node.kwargs))


@broken("gpt2", 2, 1, r"rank 0 .*all_reduce.*adds up all_reduce.* which is whole \(R\): nothing is owed")
def collective_twice_on_every_rank(programs: Programs) -> None:
    for program in programs:
        node = calls(program, all_reduce)[0]
        again = add_after(node, all_reduce, (node,), dict(node.kwargs))
        node.replace_all_uses_with(again, delete_user_cb=lambda user, again=again: user is not again)


@broken("gpt2", 2, 1, r"rank 1 .*all_reduce.*is of .*c_proj here, and of .*on rank 0")
def collectives_in_another_order(programs: Programs) -> None:
    """Two more that nothing uses, of two tensors of one shape."""
    for program in programs:
        first, second = (n.args[0] for n in calls(program, all_reduce)[:2])
        late = calls(program, all_reduce)[2]
        order = (second, first) if program.rank == 1 else (first, second)
        for tensor in order:
            late = add_after(late, all_reduce, (tensor,), {"axis": "tp"})


@broken("llama", 2, 1, r"rank 1 .*all_gather.*differ in op")
def other_collective(programs: Programs) -> None:
    node = calls(programs[1], all_reduce)[0]
    node.target = all_gather
    node.kwargs = {"axis": "tp", "dim": 2, "parts": (((0, 24),), ((24, 48),))}


@broken("llama", 2, 1, r"rank 1 .*all_gather.*they differ in dim")
def gathered_along_another_dim(programs: Programs) -> None:
    with_keyword(calls(programs[1], all_gather)[0], dim=1)


@broken("llama", 2, 1, r"rank 1 .*all_gather.*they differ in parts")
def other_parts_on_one_rank(programs: Programs) -> None:
    with_keyword(calls(programs[1], all_gather)[0], parts=(((0, 63),), ((63, 128),)))


@broken("llama", 2, 1, r"is told that lm_head is S\(2\) with elements 64:128 on this rank, and it is .* 0:64")
def parts_in_another_order(programs: Programs) -> None:
    for program in programs:
        with_keyword(calls(program, all_gather)[-1], parts=(((64, 128),), ((0, 64),)))


@broken("llama", 3, 1, r"rank 0 .*element 127 of dim 2 is in no rank's part")
def parts_with_a_hole(programs: Programs) -> None:
    """Rank 2's part is what is lost: ranks 0 and 1 are right as far as they can see."""
    for program in programs:
        node = calls(program, all_gather)[-1]
        *parts, (last,) = node.kwargs["parts"]
        with_keyword(node, parts=(*parts, ((last[0], last[1] - 1),)))


@broken("llama", 2, 1, r"no axis 'pp' to speak along")
def another_axis(programs: Programs) -> None:
    for program in programs:
        with_keyword(calls(program, all_reduce)[0], axis="pp")


@pytest.mark.drawn(14)
@pytest.mark.parametrize("case", broken.cases, ids=str)
def test_broken_programs_are_refused(case) -> None:
    check_refused(case)
