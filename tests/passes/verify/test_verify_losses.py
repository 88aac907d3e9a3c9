"""verify: losses over a vocabulary that ranks have parts of, of the wrong part, or by the wrong sum."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import pytest
import torch
from torch.fx import Node
from torch.nn import functional as F

import autodist_fx as adx
from autodist_fx.api.compiled_model import CompiledModel
from cost_model.errors import VerificationError
from passes.fx import node_meta
from passes.ops.comm import log_sum_exp
from passes.ops.losses import cross_entropy_part
from passes.partition.pipeline import emit_rank
from passes.verify.verify import verify
from tests.support.graphs.broken_programs import Programs, add_after, bypass, calls, with_argument, with_keyword
from tests.support.graphs.small import FREE
from tests.support.models import tiny_config

VOCAB = 1000


@functools.cache
def compiled() -> CompiledModel:
    config = tiny_config("llama", num_hidden_layers=1, vocab_size=VOCAB)
    return adx.compile(config, tp=2, train=True, input_names=("input_ids", "labels"), hardware=FREE, verify=False)


def check(programs: Programs) -> None:
    made = compiled()
    verify(programs, made.plan, made.op_graph, made.graph)


def loss_of(programs: Programs, rank: int) -> Node:
    return calls(programs[rank], cross_entropy_part)[0]


def sum_of(programs: Programs, rank: int) -> Node:
    return calls(programs[rank], log_sum_exp)[0]


Break = Callable[[Programs], object]
CASES: list[object] = []


def broken(message: str) -> Callable[[Break], Break]:
    def register(change: Break) -> Break:
        CASES.append(pytest.param(change, message, id=change.__name__))
        return change

    return register


@broken(r"rank 1 .*is told that its scores are those of classes \[\(0, 500\)\] of 1000, and they are .*500:1000")
def another_ranks_classes(programs: Programs) -> None:
    with_argument(loss_of(programs, 1), 3, (VOCAB, ((0, 500),)))


@broken(r"is told that its scores are those of classes \[\(0, 500\)\] of 999, and")
def fewer_classes(programs: Programs) -> None:
    with_argument(loss_of(programs, 0), 3, (999, ((0, 500),)))


@broken(r"takes 3 tensors where the model's op takes 2")
def a_sum_of_this_ranks_classes_alone(programs: Programs) -> None:
    for rank in (0, 1):
        bypass(sum_of(programs, rank))


@broken(r"rank 1 .*goes by log_sum_exp\w*, which is no sum over all classes of its scores")
def a_sum_of_other_classes(programs: Programs) -> None:
    """Both ranks tell each other of the first half."""
    node = sum_of(programs, 1)
    whole, dim, _, length = node.args[0].args  # logits are an output, too: each rank has its part of all
    with_argument(node, 0, add_after(node.args[0], torch.narrow, (whole, dim, 0, length)))


@broken(r"sums over dim 0 on 2 ranks, and \w+ is S\(1\) with elements 0:500 on 2")
def a_sum_over_rows(programs: Programs) -> None:
    for rank in (0, 1):
        with_keyword(sum_of(programs, rank), dim=0)


@broken(r"sums over dim 1 on 3 ranks, and \w+ is S\(1\) with elements 0:500 on 2")
def a_rank_too_many(programs: Programs) -> None:
    for rank in (0, 1):
        with_keyword(sum_of(programs, rank), ranks=3)


@broken(r"they differ in parts")
def ranks_that_expect_another_number(programs: Programs) -> None:
    with_keyword(sum_of(programs, 1), ranks=3)


@broken(r"rank 1 never comes to this collective|comes to log_sum_exp")
def a_rank_that_does_not_tell_its_sum(programs: Programs) -> None:
    node = sum_of(programs, 1)
    with node.graph.inserting_before(node):
        alone = node.graph.call_function(torch.logsumexp, (node.args[0], 1))
    node_meta.copy(node, alone)
    node.replace_all_uses_with(alone)
    node.graph.erase_node(node)


@broken(r"its scores are S\(1\) with elements 0:500, and it is a loss of other classes")
def a_loss_over_this_ranks_classes(programs: Programs) -> None:
    for rank in (0, 1):
        node = loss_of(programs, rank)
        theirs = next(n for n in compiled().graph.graph.nodes if n.target is F.cross_entropy)
        node.target, node.args, node.kwargs = F.cross_entropy, node.args[:2], dict(theirs.kwargs)


@broken(r"has \{.*'label_smoothing': 0\.1.*\} where the model has \{.*'label_smoothing': 0\.0")
def smoothed_labels(programs: Programs) -> None:
    for rank in (0, 1):
        with_keyword(loss_of(programs, rank), label_smoothing=0.1)


@broken(r"is a sum that is still owed|adds up")
def a_term_added_up_twice(programs: Programs) -> None:
    for rank in (0, 1):
        total = next(iter(loss_of(programs, rank).users))
        again = add_after(total, total.target, (total,), dict(total.kwargs))
        total.replace_all_uses_with(again, delete_user_cb=lambda user, again=again: user is not again)


def fresh() -> Programs:
    made = compiled()
    return [emit_rank(made.graph, made.plan, rank, train=True) for rank in (0, 1)]


def test_right_programs_pass() -> None:
    check(fresh())


@pytest.mark.parametrize(("change", "message"), CASES)
def test_broken_programs_are_refused(change: Break, message: str) -> None:
    programs = fresh()
    change(programs)
    with pytest.raises(VerificationError) as caught:
        check(programs)
    assert re.search(message, str(caught.value)), str(caught.value)
