"""verify: right programs pass, and of wrong ones each kind is refused, with the rank, the node and the reason."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable

import pytest
import torch
from editing import (
    Programs,
    add_after,
    bypass,
    calls,
    check,
    comms,
    emitted,
    with_argument,
    with_keyword,
    with_slice,
)
from tiny_models import padded_batch, tiny_model

import autodist_fx as adx
from cost_model.errors import VerificationError
from cost_model.rules.table import RULES
from passes.ops.comm import all_gather, all_reduce, recv, send
from passes.ops.parallel_layers import RowParallelLinear
from passes.verify.core.held import PARTIAL, WHOLE, Held, Judge, Shape, held

FAMILIES = ("llama", "gpt2", "opt", "qwen3", "phi3")


@pytest.mark.parametrize("mesh", [(2, 1), (3, 1), (1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("family", (*FAMILIES, "uneven", "tuples"))
def test_right_programs_pass(family: str, mesh: tuple[int, int]) -> None:
    for use_cache in (False, True):
        check(emitted(family, *mesh, use_cache), family, *mesh, use_cache)


def test_loaded_programs_pass() -> None:
    """Weights on a device, in another dtype than they were traced in."""
    model = tiny_model("gpt2")
    made = adx.compile(model, tp=2, pp=2)
    ids, mask = padded_batch()
    made.simulate(input_ids=ids, attention_mask=mask)
    for rank in range(4):
        made.rank(rank).to(torch.bfloat16)
    made.verify()


Break = Callable[[Programs], object]
CASES: list[object] = []


def broken(family: str, tp: int, pp: int, message: str, *, use_cache: bool = False) -> Callable[[Break], Break]:
    """Register a way to break a program, and what the error must say."""

    def register(change: Break) -> Break:
        CASES.append(pytest.param(family, tp, pp, use_cache, change, message, id=f"{change.__name__}-{family}"))
        return change

    return register


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


# -- placements --------------------------------------------------------------------------------------------------------


@broken("llama", 2, 1, r"output logits is lm_head, which is S\(2\) with elements 0:64 here")
def logits_not_gathered(programs: Programs) -> None:
    for program in programs:
        bypass(calls(program, all_gather)[-1])


@broken("gpt2", 2, 1, r"h_0_ln_1 \(LayerNorm, .*cannot be run here: .*P.* an all_reduce must come first")
def sum_taken_for_the_whole(programs: Programs) -> None:
    for program in programs:
        bypass(calls(program, all_reduce)[0])


@broken("llama", 2, 1, r"add_\d+ \(add, .*modeling_llama.py:\d+\): add cannot be run here: .*P.* not linear")
def whole_added_to_a_sum(programs: Programs) -> None:
    for program in programs:
        bypass(calls(program, all_reduce)[1])


@broken("opt-1", 2, 3, r"rank 0 .*sends what is a sum that is still owed over tp \(P\), and the plan sends the whole")
def sum_sent_for_the_whole(programs: Programs) -> None:
    for program in programs[:2]:
        bypass(calls(program, all_reduce)[0])


@broken("llama-1", 2, 3, r"rank 0 .*sends what is S\(2\) with elements 0:24, and the plan sends the whole")
def shard_sent_for_the_whole(programs: Programs) -> None:
    for program in programs[:2]:
        bypass(calls(program, all_gather)[0])


@broken("llama", 2, 1, r"mul_\d+ .*input 1 is .*silu.* where the model's op reads .*up_proj")
def gate_multiplied_by_itself(programs: Programs) -> None:
    for program in programs:
        node = calls(program, "down_proj")[0].args[0]
        node.args = (node.args[0], node.args[0])


@broken("llama", 2, 1, r"o_proj .*input 0 is .*reshape")
def other_tensor_of_the_same_shape(programs: Programs) -> None:
    """The second layer's attention is taken from the first."""
    for program in programs:
        first, second = calls(program, "o_proj")
        with_argument(second, 0, first.args[0])


@broken("llama", 1, 1, r"does sub where the model does add")
def another_op(programs: Programs) -> None:
    node = next(n for n in calls(programs[0], operator.add, torch.add) if len(n.all_input_nodes) > 1)
    node.target = operator.sub


@broken("llama", 1, 1, r"cat.* input 0 is .* where the model's op reads neg")
def halves_swapped(programs: Programs) -> None:
    node = next(n for n in calls(programs[0], torch.cat) if n.args[0][0] is not n.args[0][1])
    with_argument(node, 0, tuple(reversed(node.args[0])))


@broken("gpt2", 1, 1, r"transpose.* has \{'order': \(0, 1, 3, 2\)\} where the model has \{'order': \(0, 2, 1, 3\)\}")
def dims_of_a_transpose(programs: Programs) -> None:
    with_argument(calls(programs[0], "transpose")[0], 1, 3)


@broken("gpt2", 1, 1, r"pow_1 \(pow, .*is called with \(.*, 2.0\).* and the model calls it with \(.*, 3.0\)")
def another_exponent(programs: Programs) -> None:
    node = calls(programs[0], torch.pow)[0]
    with_argument(node, 1, 2.0)


@broken("llama", 2, 1, r"rank 1 .*rms_norm.*has eps 1e-05, and the model \[1e-06\]")
def another_eps(programs: Programs) -> None:
    with_argument(calls(programs[1], torch.nn.functional.rms_norm)[0], 3, 1e-5)


@broken("llama", 2, 1, r"attention.*is called with .*'scale': 1.0.* and the model calls it with")
def another_scale(programs: Programs) -> None:
    with_keyword(calls(programs[0], torch.nn.functional.scaled_dot_product_attention)[0], scale=1.0)


@broken("gpt2", 2, 1, r"rank 1 .*h_0_ln_1 \(LayerNorm, .*is LayerNorm with eps=0.1, and the model has LayerNorm")
def another_eps_of_a_module(programs: Programs) -> None:
    programs[1].graph_module.get_submodule("transformer.h.0.ln_1").eps = 0.1


@broken("bloom", 2, 1, r"getitem.*takes \(Ellipsis, 0, slice.* of dim 3, and the model takes \(Ellipsis, 1, slice")
def element_that_an_index_takes(programs: Programs) -> None:
    """Queries for keys."""
    for program in programs:
        node = next(n for n in calls(program, operator.getitem) if n.args[1] == (..., 1, slice(None)))
        with_argument(node, 1, (..., 0, slice(None)))


# -- local shapes ------------------------------------------------------------------------------------------------------


@broken("llama", 2, 1, r"view \(reshape, .*cannot be run on this rank's shapes \(.*q_proj float32\[11, 23, 32\]\)")
def whole_size_in_a_reshape(programs: Programs) -> None:
    node = calls(programs[0], torch.reshape)[0]
    with_argument(node, 1, (*node.args[1][:2], 6, 8))


@broken("llama", 2, 1, r"view.*gives float32\[11, 23, 8, 4\] on this rank, and its share is float32\[11, 23, 4, 8\]")
def heads_and_head_size_swapped(programs: Programs) -> None:
    node = next(n for n in calls(programs[0], torch.reshape) if n.args[1][-2:] == (4, 8))
    with_argument(node, 1, (*node.args[1][:2], 8, 4))


@broken("llama", 2, 1, r"its size 11 follows the inputs \(B\), and is a number here")
def example_length_in_a_reshape(programs: Programs) -> None:
    node = calls(programs[0], torch.reshape)[0]
    with_argument(node, 1, (11, *node.args[1][1:]))


@broken("gpt2", 2, 1, r"split.*gives \(float32\[11, 23, 23\].* and its share is \(float32\[11, 23, 24\]")
def pieces_of_a_split(programs: Programs) -> None:
    for program in programs:
        with_argument(calls(program, torch.split)[0], 1, [23, 25, 24])


@broken("gpt2", 2, 1, r"view.* input 0 is split\[2\] where the model's op reads split\[1\]")
def keys_and_values_swapped(programs: Programs) -> None:
    for program in programs:
        split = calls(program, torch.split)[0]
        _, key, value = split.users
        key.args, value.args = value.args, key.args


@broken("phi3", 2, 1, r"getitem.*takes .* of its share, where the model's slice lies at")
def slice_shifted_by_one_head(programs: Programs) -> None:
    for program in programs:
        qkv = calls(program, "qkv_proj")[0]
        key = next(n for n in list(qkv.users)[1:] if n.target is operator.getitem)
        *rest, last = key.args[1]
        with_argument(key, 1, (*rest, slice(last.start - 8, last.stop - 8)))


@broken("phi3", 2, 1, r"getitem.*gives float32\[11, 23, 24\] on this rank, and its share is float32\[11, 23, 16\]")
def slice_too_long(programs: Programs) -> None:
    qkv = calls(programs[1], "qkv_proj")[0]
    *rest, last = next(iter(qkv.users)).args[1]
    with_argument(next(iter(qkv.users)), 1, (*rest, slice(last.start, last.stop + 8)))


@broken("uneven", 3, 1, r"rank 1 .*index_select.* copies of elements \[0, 0, 1\], .* copies of \[0, 1, 1\]")
def other_kv_head_picked(programs: Programs) -> None:
    constant = next(b for name, b in programs[1].graph_module.named_buffers() if "_heads_of_" in name)
    assert constant.tolist() == [0, 1, 1]
    constant.copy_(torch.tensor([0, 0, 1]))


@broken("llama", 2, 1, r"attention.* input 1 is .* where the model's op reads")
def attention_takes_values_for_keys(programs: Programs) -> None:
    for program in programs:
        node = calls(program, torch.nn.functional.scaled_dot_product_attention)[0]
        q, k, v = node.args[:3]
        node.args = (q, v, k)


@broken("llama", 3, 1, r"attention.* takes heads of .* that are not repeated, and does not repeat them")
def attention_without_its_groups(programs: Programs) -> None:
    for node in calls(programs[0], torch.nn.functional.scaled_dot_product_attention):
        with_keyword(node, enable_gqa=False)


# -- weights -----------------------------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


@broken("llama", 2, 1, r"q_proj.weight .*element 0 of dim 0 is on no rank of stage 0 \(1 are missing\)")
def slice_shifted_by_one(programs: Programs) -> None:
    (start, stop) = programs[0].param_shards[Q].intervals[0]
    with_slice(programs[0], Q, [(start + 1, stop + 1)])


@broken("llama", 2, 1, r"down_proj.weight .*element 0 of dim 1 is on 2 ranks of stage 0, which the plan does not say")
def elements_owned_twice(programs: Programs) -> None:
    with_slice(programs[1], DOWN, [(0, 80)])


@broken("llama", 2, 1, r"q_proj.weight is not dealt as the plan says: rank 0 has \[\(0, 31\)\]")
def border_between_ranks_moved(programs: Programs) -> None:
    with_slice(programs[0], Q, [(0, 31)])
    with_slice(programs[1], Q, [(31, 48)])


@broken("llama", 2, 1, r"q_proj.weight is not dealt as the plan says")
def slices_of_two_ranks_swapped(programs: Programs) -> None:
    a, b = (program.param_shards[Q].intervals for program in programs)
    with_slice(programs[0], Q, b)
    with_slice(programs[1], Q, a)


@broken("gpt2", 2, 1, r"c_attn.weight holds \[\(48, 72\), \(0, 24\), .*: not ascending pieces of it")
def segments_of_a_fused_weight_in_another_order(programs: Programs) -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    first, second, third = programs[0].param_shards[name].intervals
    with_slice(programs[0], name, (second, first, third))


NORM = "model.decoder.layers.1.final_layer_norm"


@broken("opt", 2, 2, r"no rank of stage 1 holds model.decoder.layers.1.final_layer_norm.bias, which the stage uses")
def parameter_missing(programs: Programs) -> None:
    for program in programs[2:]:
        del program.param_shards[f"{NORM}.bias"]  # type: ignore[attr-defined]
        program.graph_module.get_submodule(NORM).bias = None


@broken("opt", 2, 1, r"final_layer_norm.bias .* is whole on ranks \[0\] and missing on \[1\]")
def parameter_missing_on_one_rank(programs: Programs) -> None:
    del programs[1].param_shards[f"{NORM}.bias"]  # type: ignore[attr-defined]
    programs[1].graph_module.get_submodule(NORM).bias = None


@broken("llama", 2, 1, r"rank 1 .*nothing says what model.norm.weight is loaded from")
def parameter_without_a_source(programs: Programs) -> None:
    del programs[1].param_shards["model.norm.weight"]


@broken("llama", 2, 1, r"rank 0 .*q_proj.weight is \[31, 48\], and its share of .* is \[\d+, 48\]")
def local_shape_is_not_the_shards(programs: Programs) -> None:
    module = programs[0].graph_module.get_submodule("model.layers.0.self_attn.q_proj")
    module.weight = torch.nn.Parameter(torch.empty(31, 48, device="meta"))


@broken("llama", 2, 1, r"input 1 is .*layers.1.*q_proj.weight where the model's op reads .*layers.0")
def weights_of_two_layers_swapped(programs: Programs) -> None:
    for program in programs:
        shards = program.param_shards
        other = Q.replace("layers.0", "layers.1")
        shards[Q], shards[other] = (  # type: ignore[index]
            dataclasses.replace(shards[other], name=Q),
            dataclasses.replace(shards[Q], name=other),
        )


@broken("gpt2", 2, 1, r"are both the same piece of transformer.wte.weight, and not one tensor")
def tie_cut(programs: Programs) -> None:
    head = programs[0].graph_module.get_submodule("lm_head")
    head.weight = torch.nn.Parameter(head.weight.detach().clone())


@broken("opt", 2, 1, r"rank 0 .*out_proj \(RowParallelLinear, .*its bias is added on ranks \[0, 1\] instead of one")
def bias_on_every_rank(programs: Programs) -> None:
    name = "model.decoder.layers.0.self_attn.out_proj"
    programs[1].graph_module.get_submodule(name).bias = programs[0].graph_module.get_submodule(name).bias
    programs[1].param_shards[f"{name}.bias"] = programs[0].param_shards[f"{name}.bias"]


@broken("opt", 2, 1, r"no rank of stage 0 holds model.decoder.layers.0.self_attn.out_proj.bias")
def bias_on_no_rank(programs: Programs) -> None:
    name = "model.decoder.layers.0.self_attn.out_proj"
    module = programs[0].graph_module.get_submodule(name)
    assert isinstance(module, RowParallelLinear)
    module.bias = None
    del programs[0].param_shards[f"{name}.bias"]


@broken("opt", 2, 1, r"q_proj.bias\) is dealt out on stage 0, and ranks \[1\] have no share")
def bias_of_a_column_missing(programs: Programs) -> None:
    name = "model.decoder.layers.0.self_attn.q_proj"
    programs[1].graph_module.get_submodule(name).bias = None
    del programs[1].param_shards[f"{name}.bias"]


@broken("gpt2", 2, 1, r"rank 1 .*looks up S\(0\) with elements 0:64, and its table is S\(0\) with elements 64:128")
def rows_of_another_rank(programs: Programs) -> None:
    programs[1].graph_module.get_submodule("transformer.wte").intervals = ((0, 64),)


# -- caches and outputs ------------------------------------------------------------------------------------------------


@broken("llama", 2, 2, r"rank 2 .*update.*writes cache layer 1 of this rank, whose layers are those numbered \[1\]",
        use_cache=True)  # fmt: skip
def cache_layer_off_by_one(programs: Programs) -> None:
    with_argument(calls(programs[2], "update")[0], 3, 1)


@broken("llama", 2, 1, r"writes cache layer 1 .*the model writes 0", use_cache=True)
def cache_layers_swapped(programs: Programs) -> None:
    for program in programs:
        first, second = calls(program, "update")
        with_argument(first, 3, 1)
        with_argument(second, 3, 0)


@broken("llama", 1, 2, r"layers are those numbered \[0\] in the model; the model writes 1", use_cache=True)
def cache_of_another_stage(programs: Programs) -> None:
    programs[1].cache_layers = (0,)


@broken("llama", 2, 1, r"writes its 2 cache layers in the order \[1, 0\]", use_cache=True)
def cache_in_another_order(programs: Programs) -> None:
    for program in programs:
        program.cache_layers = (1, 0)
        for node, layer in zip(calls(program, "update"), (1, 0), strict=True):
            with_argument(node, 3, layer)


@broken("llama", 2, 1, r"update.* input 0 is transpose_3 where the model's op reads add_4", use_cache=True)
def values_cached_as_keys(programs: Programs) -> None:
    for program in programs:
        node = calls(program, "update")[0]
        cache, key, value, *rest = node.args
        node.args = (cache, value, key, *rest)


@broken("llama", 1, 1, r"attention.* input 1 is add_4 where the model's op reads", use_cache=True)
def cache_not_written(programs: Programs) -> None:
    node = calls(programs[0], "update")[0]
    for piece, tensor in zip(list(node.users), node.args[1:3], strict=True):
        piece.replace_all_uses_with(tensor)
        piece.graph.erase_node(piece)
    node.graph.erase_node(node)


@broken("llama", 1, 2, r"no rank returns lm_head, an output of the model")
def output_lost(programs: Programs) -> None:
    output = next(n for n in programs[1].graph_module.graph.nodes if n.op == "output")
    output.args = ({k: v for k, v in output.args[0].items() if k != "logits"},)


@broken("llama", 2, 1, r"rank 1 .*returns \['scores'\], rank 0 \['logits'\]")
def output_under_another_name(programs: Programs) -> None:
    output = next(n for n in programs[1].graph_module.graph.nodes if n.op == "output")
    output.args = ({"scores": output.args[0]["logits"]},)


@broken("llama", 2, 1, r"returns lm_head as scores, and the model returns logits only")
def output_under_another_name_on_every_rank(programs: Programs) -> None:
    for program in programs:
        output = next(n for n in program.graph_module.graph.nodes if n.op == "output")
        output.args = ({"scores": output.args[0]["logits"]},)


@broken("llama", 1, 1, r"returns mul_\d+ as logits, which is no output of the model")
def another_output(programs: Programs) -> None:
    output = next(n for n in programs[0].graph_module.graph.nodes if n.op == "output")
    output.args = ({"logits": output.args[0]["logits"].args[0]},)


@pytest.mark.parametrize(("family", "tp", "pp", "use_cache", "change", "message"), CASES)
def test_broken_programs_are_refused(
    family: str, tp: int, pp: int, use_cache: bool, change: Break, message: str
) -> None:
    programs = emitted(family, tp, pp, use_cache)
    check(programs, family, tp, pp, use_cache)
    change(programs)
    with pytest.raises(VerificationError) as caught:
        check(programs, family, tp, pp, use_cache)
    assert re.search(message, str(caught.value)), str(caught.value)


# -- the rules as typing rules -----------------------------------------------------------------------------------------


def _judged(kind: str, inputs: list[Shape], output: Shape, types: list[Held]) -> tuple[list[Held], str]:
    """What one rank has of the one output, in all ways that the rule allows; and why there is none."""
    judged = Judge()(RULES[kind](inputs, [output], {}), inputs, [output], tuple(types))
    return [d.outputs[0] for d in judged.derivations], judged.reason


def test_a_view_keeps_heads_whole() -> None:
    view = ("view", [(2, 3, 32)], (2, 3, 4, 8))
    assert _judged(*view, [held(2, [(8, 24)], 32)])[0] == [held(2, [(1, 3)], 4)]
    assert _judged(*view, [held(2, [(8, 23)], 32)])[0] == []
    assert "a piece is cut in two" in _judged(*view, [held(2, [(8, 23)], 32)])[1]
    assert _judged(*view, [PARTIAL])[0] == [PARTIAL]


def test_a_linear_is_cut_alike_in_all_its_inputs() -> None:
    linear = ("linear", [(2, 3, 16), (32, 16), (32,)], (2, 3, 32))
    rows, columns = held(0, [(0, 8)], 32), held(1, [(0, 8)], 16)
    assert _judged(*linear, [WHOLE, rows, rows])[0] == [held(2, [(0, 8)], 32)]
    assert _judged(*linear, [held(2, [(0, 8)], 16), columns, WHOLE])[0] == [PARTIAL]
    assert _judged(*linear, [WHOLE, rows, WHOLE])[0] == []  # another part of the bias
    assert _judged(*linear, [held(2, [(1, 9)], 16), columns, WHOLE])[0] == []
    assert _judged(*linear, [held(2, [(0, 8)], 16), rows, rows])[0] == []
    assert _judged(*linear, [PARTIAL, WHOLE, WHOLE])[0] == []  # the bias would be added on every rank


def test_a_sum_goes_through_linear_ops_alone() -> None:
    assert _judged("add", [(2, 8), (2, 8)], (2, 8), [PARTIAL, PARTIAL])[0] == [PARTIAL]
    assert _judged("add", [(2, 8), (2, 8)], (2, 8), [PARTIAL, WHOLE])[0] == []
    assert _judged("silu", [(2, 8)], (2, 8), [PARTIAL])[0] == []
    assert _judged("add", [(2, 8), (2, 8)], (2, 8), [PARTIAL, held(1, [(0, 4)], 8)])[0] == []


def test_attention_reads_the_kv_heads_of_its_queries() -> None:
    shapes: list[Shape] = [(2, 6, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)]
    queries = held(1, [(2, 6)], 6)
    for kv, right in ([(1, 3)], True), ([(0, 2)], False), ([(0, 3)], False), ([(1, 2)], False):
        own = held(1, kv, 3)
        assert _judged("sdpa", shapes, (2, 6, 5, 8), [queries, own, own])[0] == ([queries] if right else [])


def test_what_is_held_has_one_form() -> None:
    assert held(0, [(0, 4), (4, 8)], 8) == WHOLE
    assert held(0, [(0, 2), (2, 4), (6, 6)], 8) == Held(0, ((0, 4),))
    assert held(0, [(4, 8), (0, 4)], 8) == Held(0, ((4, 8), (0, 4)))  # all of it, in another order
