"""verify: Values, placements and local shapes that are wrong are refused, with the rank, the node and the reason."""

from __future__ import annotations

import operator

import pytest
import torch

from passes.ops.comm import all_gather, all_reduce
from tests.support.graphs.broken_programs import (
    BrokenPrograms,
    Programs,
    bypass,
    calls,
    check_refused,
    with_argument,
    with_keyword,
)

broken = BrokenPrograms()

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


@pytest.mark.drawn(14)
@pytest.mark.parametrize("case", broken.cases, ids=str)
def test_broken_programs_are_refused(case) -> None:
    check_refused(case)
