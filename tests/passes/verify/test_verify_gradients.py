"""verify: programs to be trained that owe something backward and do not pay it, or pay it twice, are refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest
import torch
from torch.fx import Node

from cost_model.errors import VerificationError
from passes.fx import node_meta
from passes.ops.comm import all_reduce, copy_to_tp, recv, send
from passes.ops.parallel_layers import one_gradient
from passes.partition.pipeline import emit_rank
from passes.program.gradient_sums import GradSum
from passes.verify.verify import verify
from tests.support.graphs.broken_programs import Programs, add_after, bypass, calls, compiled, with_keyword

FAMILIES = ("llama", "gpt2", "opt", "qwen3", "phi3", "uneven", "tuples")


def _emitted(family: str, tp: int, pp: int) -> Programs:
    model = compiled(family, tp, pp)
    return [emit_rank(model.graph, model.plan, rank, train=True) for rank in range(tp * pp)]


def _check(programs: Programs, family: str, tp: int, pp: int) -> None:
    model = compiled(family, tp, pp)
    verify(programs, model.plan, model.op_graph, model.graph)


@pytest.mark.one_for_each("family")
@pytest.mark.parametrize("mesh", [(4, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_right_programs_pass(family: str, mesh: tuple[int, int]) -> None:
    _check(_emitted(family, *mesh), family, *mesh)


def test_programs_for_inference_are_as_ever() -> None:
    model = compiled("qwen3", 2, 2)
    for rank in range(4):
        program = emit_rank(model.graph, model.plan, rank)
        assert program.grad_sums is None and not calls(program, copy_to_tp, one_gradient)
        assert not any("gradient" in n.kwargs for n in calls(program, send, recv))


Break = Callable[[Programs], object]
CASES: list[object] = []


def broken(family: str, tp: int, pp: int, message: str) -> Callable[[Break], Break]:
    def register(change: Break) -> Break:
        CASES.append(pytest.param(family, tp, pp, change, message, id=f"{change.__name__}-{family}"))
        return change

    return register


def _copy(programs: Programs, number: int = 0) -> list[Node]:
    """The same copy_to_tp on every rank of the first stage."""
    return [found[number] for found in (calls(p, copy_to_tp) for p in programs) if found]


# -- values ------------------------------------------------------------------------------------------------------------


@broken("llama", 2, 1, r"q_proj.*reads the whole of mul_\d .* and computes a part: .* nothing adds them up")
def copy_left_out(programs: Programs) -> None:
    for node in _copy(programs):
        bypass(node)


@broken("gpt2", 2, 2, r"rank 1 .*c_attn.*reads the whole of .*ln_1")
def copy_left_out_on_one_rank(programs: Programs) -> None:
    bypass(_copy(programs)[1])


@broken("llama", 2, 1, r"k_proj.*reads the whole of mul_\d")
def one_reader_passes_the_copy_by(programs: Programs) -> None:
    for program in programs:
        reader = calls(program, "layers.0.self_attn.k_proj")[0]
        reader.replace_input_with(reader.args[0], reader.args[0].args[0])


@broken("llama", 2, 1, r"copy_to_tp.*each rank has a term of its gradient: .* added up over tp twice")
def copy_of_a_copy(programs: Programs) -> None:
    for node in _copy(programs):
        again = add_after(node, copy_to_tp, (node,), {"axis": "tp"})
        node.replace_all_uses_with(again, delete_user_cb=lambda user, again=again: user is not again)


@broken("gpt2", 2, 1, r"add.*reads copy_to_tp.*, of whose gradient each rank is to have a term, beside .* 2 times")
def copy_of_what_all_read_whole(programs: Programs) -> None:
    """The residual: its other reader's gradient is whole."""
    for program in programs:
        residual = calls(program, "h.0.ln_1")[0].args[0]
        again = add_after(residual, copy_to_tp, (residual,), {"axis": "tp"})
        reader = next(u for u in residual.users if u.name.startswith("add"))
        reader.replace_input_with(residual, again)


@broken("gpt2", 2, 1, r"ends with a gradient of transformer.h.0.ln_1.weight .* that lacks what rank [01] has of it")
def copy_before_the_norm(programs: Programs) -> None:
    """Right for what comes before; the norm's own parameters then owe a sum."""
    for node in _copy(programs):
        norm = node.args[0]
        bypass(node)
        before = add_after(norm.args[0], copy_to_tp, (norm.args[0],), {"axis": "tp"})
        norm.replace_input_with(norm.args[0], before)


@broken("llama", 2, 1, r"no axis 'pp' to add gradients up along")
def copy_along_another_axis(programs: Programs) -> None:
    for node in _copy(programs):
        with_keyword(node, axis="pp")


@broken("llama", 1, 2, r"copy_to_tp.*no axis 'tp' to add gradients up along")
def copy_without_a_group(programs: Programs) -> None:
    norm = calls(programs[0], "layers.0.mlp.gate_proj")[0].args[0]
    again = add_after(norm, copy_to_tp, (norm,), {"axis": "tp"})
    norm.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)


@broken("llama", 2, 1, r"rank 1 .*adds up the gradient of .*, where rank 0 adds up that of")
def copies_in_another_order(programs: Programs) -> None:
    """Nothing is wrong on any one rank: the residual's copy is read by nobody who computes a part."""
    for program, first in zip(programs, (0, 1), strict=True):
        whole = [n.args[0] for n in calls(program, copy_to_tp)][:2]
        readers = [next(iter(n.users)) for n in calls(program, copy_to_tp)][:2]
        at = readers[1]
        for i in (first, 1 - first):
            with at.graph.inserting_before(at):
                new = at.graph.call_function(copy_to_tp, (whole[i],), {"axis": "tp"})
            node_meta.copy(whole[i], new)
            if i == 1:
                at.replace_input_with(at.args[0], new)


@broken("llama", 2, 1, r"rank 1 .*nothing that leaves this rank is made of it, and rank 0 adds up its gradient")
def copy_that_nothing_uses_on_one_rank(programs: Programs) -> None:
    """Two copies of one value on both ranks; one of them is read on rank 0 alone."""
    for program, node in zip(programs, _copy(programs), strict=True):
        again = add_after(node, copy_to_tp, node.args, node.kwargs)
        reader = calls(program, "layers.0.self_attn.q_proj")[0]
        if program.rank == 0:
            reader.replace_input_with(node, again)


@broken("phi3-1kv", 2, 1, r"copy_to_tp.*of transpose_\d, each rank has a term of its gradient: .* over tp twice")
def one_kv_head_taken_for_the_whole(programs: Programs) -> None:
    """Takes a head that all ranks have out of one product, of whose gradient each has a term: copied, it is counted
    twice."""
    for program in programs:
        attention = calls(program, torch.nn.functional.scaled_dot_product_attention)[0]
        value = attention.args[2]
        again = add_after(value, copy_to_tp, (value,), {"axis": "tp"})
        attention.replace_input_with(value, again)


@broken("llama", 2, 1, r"one_gradient.*each rank has the whole gradient of it: all ranks but the first would lose it")
def gradient_left_to_the_first_rank(programs: Programs) -> None:
    for program in programs:
        total = calls(program, all_reduce)[0]
        one = add_after(total, one_gradient, (total,), {"tp_rank": program.tp_rank})
        total.replace_all_uses_with(one, delete_user_cb=lambda user, one=one: user is not one)


# -- stages ------------------------------------------------------------------------------------------------------------


@broken("llama", 2, 2, r"rank 1 .*send.*says that no gradient comes back")
def gradient_that_is_not_waited_for(programs: Programs) -> None:
    node = calls(programs[1], send)[0]
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "gradient"}


@broken("gpt2", 1, 2, r"rank 1 .*recv.*says that no gradient comes back")
def gradient_that_is_not_sent_back(programs: Programs) -> None:
    with_keyword(next(n for n in calls(programs[1], recv) if "gradient" in n.kwargs), gradient=False)


@broken("opt", 1, 2, r"rank 0 .*send.*says that a gradient comes back, and no parameter is behind it")
def gradient_of_frozen_layers(programs: Programs) -> None:
    for parameter in programs[0].graph_module.parameters():
        parameter.requires_grad_(False)


@broken("llama", 2, 1, r"rank 1 .* is for inference, and rank 0 is to be trained")
def one_rank_for_inference(programs: Programs) -> None:
    programs[1].grad_sums = None


@broken("opt", 2, 1, r"rank 1 .*embed_tokens.*keeps the gradient from row None, and the model from row 0")
def padding_gets_a_gradient(programs: Programs) -> None:
    table = programs[1].graph_module.get_submodule("model.decoder.embed_tokens")
    assert table.padding_idx == 0
    table.padding_idx = None


# -- parameters --------------------------------------------------------------------------------------------------------


def _change(programs: Programs, part: str, change: Callable[[GradSum], GradSum | None]) -> None:
    """Changes all sums of sources whose name has `part` in it, on every rank alike."""
    for program in programs:
        assert program.grad_sums is not None
        changed = [change(s) if part in s.source else s for s in program.grad_sums]
        program.grad_sums = tuple(s for s in changed if s is not None and program.rank in s.ranks)


@broken("qwen3", 2, 1, r"rank 0 .*ends with a gradient of .*q_norm.weight .* that lacks what rank 1 has of it")
def sum_left_out(programs: Programs) -> None:
    assert any("q_norm" in s.source for s in programs[0].grad_sums or ())
    _change(programs, "q_norm", lambda s: None)


@broken("qwen3", 2, 1, r"gradients of .*q_norm.weight .*added up over ranks \[0, 1\], and rank 1 .* says nothing of it")
def sum_left_out_on_one_rank(programs: Programs) -> None:
    _change(programs[1:], "layers.0.self_attn.q_norm", lambda s: None)


@broken("qwen3", 2, 1, r"rank 0 .*adds up the gradients of .*k_norm.weight .* twice")
def sum_done_twice(programs: Programs) -> None:
    for program in programs:
        owed = program.grad_sums or ()
        program.grad_sums = (*owed, *(s for s in owed if "layers.0.self_attn.k_norm" in s.source))


@broken("qwen3", 4, 1, r"q_norm.weight .* that lacks what rank [0-3] has of it")
def sum_over_half_the_group(programs: Programs) -> None:
    _change(programs, "q_norm", lambda s: dataclasses.replace(s, terms=s.terms[:2], holders=s.holders[:2]))


@broken("qwen3", 2, 1, r"q_norm.weight .* that lacks what rank 1 has of it")
def sum_without_a_term(programs: Programs) -> None:
    _change(programs, "q_norm", lambda s: dataclasses.replace(s, terms=s.terms[:1]))


@broken("qwen3", 2, 1, r"q_norm.weight \[\(7, 8\)\] that lacks")
def sum_of_too_few_elements(programs: Programs) -> None:
    _change(programs, "q_norm", lambda s: dataclasses.replace(s, box=((0, 7),)))


@broken("gpt2", 1, 2, r"rank 0 .* ends with a gradient of transformer.wte.weight .* that lacks what stage 1 has of it")
def tied_embedding_not_summed(programs: Programs) -> None:
    assert any("wte" in s.source for s in programs[0].grad_sums or ())
    _change(programs, "wte", lambda s: None)


@broken("gpt2", 2, 2, r"wte.weight \[\(0, 64\), .* are added up on rank 3 .*, which does not hold")
def tied_embedding_summed_with_the_wrong_rank(programs: Programs) -> None:
    """Rank 0 has the first half of the rows, and rank 3 the second."""

    def crossed(s: GradSum) -> GradSum:
        swap = {2: 3, 3: 2}
        changed = tuple((swap.get(r, r), path) for r, path in s.holders)
        return dataclasses.replace(s, holders=changed, terms=changed)

    for program in programs:
        program.grad_sums = tuple(crossed(s) if "wte" in s.source else s for s in program.grad_sums or ())
    everything = list(dict.fromkeys(s for p in programs for s in p.grad_sums or ()))
    for program in programs:
        program.grad_sums = tuple(s for s in everything if program.rank in s.ranks)


@broken("gpt2", 2, 1, r"ln_1.weight .* that has what stage 0 has of it .* 2 times")
def sum_of_what_is_whole(programs: Programs) -> None:
    """A norm that all ranks run alike has its whole gradient on each."""
    path = "transformer.h.0.ln_1.weight"
    holders = tuple((p.rank, path) for p in programs)
    for program in programs:
        program.grad_sums = (*(program.grad_sums or ()), GradSum(path, ((0, 48),), holders, holders))


@broken("uneven", 3, 1, r"k_proj.weight \[\(.*\)\] that lacks what rank [0-2] has of it")
def kv_head_of_two_ranks_not_summed(programs: Programs) -> None:
    assert any("k_proj" in s.source for s in programs[1].grad_sums or ())
    _change(programs, "layers.0.self_attn.k_proj", lambda s: None)


@broken("uneven", 3, 1, r"added up on rank 2 .*which does not hold")
def kv_head_summed_with_a_rank_that_has_it_not(programs: Programs) -> None:
    path = "model.layers.0.self_attn.k_proj.weight"

    def wider(s: GradSum) -> GradSum:
        holders = tuple((rank, path) for rank in range(3))
        return dataclasses.replace(s, holders=holders) if 2 not in s.ranks else s

    everything = [wider(s) if s.source == path else s for p in programs for s in p.grad_sums or ()]
    for program in programs:
        program.grad_sums = tuple(s for s in dict.fromkeys(everything) if program.rank in s.ranks)


@broken("qwen3", 2, 1, r"ranks 0 and 1 add up gradients of parameters in another order")
def sums_in_another_order(programs: Programs) -> None:
    programs[1].grad_sums = tuple(reversed(programs[1].grad_sums or ()))


@broken("uneven", 3, 1, r"ranks would wait for each other for ever, adding up the gradients of .*norm.*, .* in turn")
def sums_in_a_ring(programs: Programs) -> None:
    """Each two ranks have one sum together, so that no two of them disagree; all three wait."""

    def over(path: str, *ranks: int) -> GradSum:
        holders = tuple((rank, path) for rank in ranks)
        return GradSum(path, ((0, 48),), holders, holders)

    layer = "model.layers.0"
    a, b = over("model.norm.weight", 0, 1), over(f"{layer}.input_layernorm.weight", 1, 2)
    c = over(f"{layer}.post_attention_layernorm.weight", 0, 2)
    for program, own in zip(programs, ((a, c), (b, a), (c, b)), strict=True):
        program.grad_sums = own


@pytest.mark.drawn(14)
@pytest.mark.parametrize(("family", "tp", "pp", "change", "message"), CASES)
def test_broken_programs_are_refused(family: str, tp: int, pp: int, change: Break, message: str) -> None:
    programs = _emitted(family, tp, pp)
    _check(programs, family, tp, pp)
    change(programs)
    for program in programs:
        program.graph_module.graph.lint()
    with pytest.raises(VerificationError) as caught:
        _check(programs, family, tp, pp)
    assert re.search(message, str(caught.value)), str(caught.value)
