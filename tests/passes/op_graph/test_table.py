"""Handlers emit the kinds of op that their file declares, and every such kind has a rule: else nothing is imported."""

from __future__ import annotations

import importlib.util
import runpy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autodist_fx as adx
import cost_model.rules.table
from cost_model.rules import convolutions, elementwise, indexing, losses, matmuls, reductions, views
from cost_model.rules.table import RULES
from passes.op_graph.build import build_op_graph
from passes.op_graph.table import HANDLERS, KINDS, MODULES, check_kinds
from passes.ops.data_dependent import join_rows, split_rows
from passes.ops.experts import experts
from passes.ops.functional_writes import with_item
from tests.support.encoders import tiny_encoder
from tests.support.graphs.small import normalized
from tests.support.models import tiny_model
from tests.support.moe import tiny_moe_model
from tests.support.seq2seq import tiny_seq2seq

RULE_FILES = {
    "convolutions": convolutions, "elementwise": elementwise, "indexing": indexing, "losses": losses,
    "matmuls": matmuls, "reductions": reductions, "views": views,
}  # fmt: skip


def test_every_rule_is_of_a_kind_that_some_handler_emits() -> None:
    assert set(RULES) == {kind for own in KINDS.values() for kind in own}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # run a second time, under another name
@pytest.mark.parametrize("lost", RULE_FILES)
def test_no_import_without_the_rules_of_a_file(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every op of these kinds would be replicated without a word."""
    rest = {kind: rule for kind, rule in RULES.items() if kind not in RULE_FILES[lost].RULES}
    monkeypatch.setattr(cost_model.rules.table, "RULES", rest)
    with pytest.raises(ImportError) as error:
        runpy.run_module("passes.op_graph.table")
    kinds = {kind for own in KINDS.values() for kind in own if kind in RULE_FILES[lost].RULES}
    assert kinds and all(kind in str(error.value) for kind in kinds)
    assert "add a row to cost_model/rules" in str(error.value)


def test_a_kind_that_is_replicated_on_purpose_needs_no_rule() -> None:
    check_kinds({"views": ("view", "tile")}, {"view"}, {"tile"})
    with pytest.raises(ImportError, match=r"passes/op_graph/views\.py emits tile: no rule"):
        check_kinds({"views": ("view", "tile")}, {"view"}, {})


# transformers 5 marks a layer of experts, which is then one node; 4.57 has a module for each.
OF_EXPERTS = {"experts"} if importlib.util.find_spec("transformers.integrations.moe") else {"index", "index_add"}

Emitted = set[tuple[str, str]]  # (file of the handler, kind)


@pytest.fixture
def emitted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emitted]:
    """Notes what handlers emit while the test runs."""
    found: Emitted = set()

    def recording(file: str, handler: Callable[..., Any]) -> Callable[..., Any]:
        def handle(*args: Any) -> Any:
            answer = handler(*args)
            if answer is not None:
                found.add((file, answer[0]))
            return answer

        return handle

    for table in (HANDLERS, MODULES):
        for name, handler in table.items():
            monkeypatch.setitem(table, name, recording(handler.__module__.rpartition(".")[2], handler))
    yield found


DECLARED = {(file, kind) for file, own in KINDS.items() for kind in own}


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    "make, among",
    [
        (lambda: tiny_model("llama"), {"linear", "embedding", "cache_update", "cat"}),
        (lambda: tiny_model("gpt2"), {"linear", "layer_norm", "split", "sdpa"}),
        (lambda: tiny_moe_model("mixtral"), OF_EXPERTS | {"softmax"}),
        (lambda: tiny_seq2seq("t5"), {"cache_update", "cache_read"}),
        (lambda: tiny_encoder("ResNetForImageClassification", "resnet"), {"conv", "batch_norm", "pool"}),
    ],
    ids=["llama", "gpt2", "mixtral", "t5", "resnet"],
)
def test_models_give_declared_kinds(make: Callable[[], nn.Module], among: set[str], emitted: Emitted) -> None:
    model = make()
    adx.compile(model, tp=2, use_cache="resnet" not in model.config.model_type, verify=False)
    assert emitted <= DECLARED
    assert among <= {kind for _, kind in emitted}


class _Expression(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"y": self.function(x)}


class _Modules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.act = nn.Linear(4, 6), nn.LayerNorm((6, 6)), nn.SiLU()
        self.table, self.pool = nn.Embedding(9, 4), nn.AvgPool2d(2)
        self.groups, self.batch = nn.GroupNorm(2, 6), nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        normed = self.batch(self.groups(x.flatten(0, 1)))
        return {"x": normed, "y": self.pool(self.act(self.norm(self.linear(x)))), "z": self.table(x.long())}


def _zeros(x: torch.Tensor) -> torch.Tensor:
    """Three numbers of elements."""
    return x.new_zeros(3, dtype=torch.long)


for _name in ("with_item", "split_rows", "join_rows", "experts"):  # one node each, as in traced models
    torch.fx.wrap(_name)

# Of x [B, S, 6, 4].
EXPRESSIONS: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda x: x.reshape(-1, 24), lambda x: x[:, :, :, :1].expand(-1, -1, -1, 7), lambda x: x.permute(0, 2, -1, 1),
    lambda x: x.chunk(2, -1), lambda x: x.unbind(2), lambda x: torch.cat([x, x], -1), lambda x: torch.stack([x, x]),
    lambda x: x.repeat_interleave(3, dim=2), lambda x: x[..., 1:3],
    lambda x: x[_zeros(x)], lambda x: x.index_add(2, x.new_zeros(6, dtype=torch.long), x),
    lambda x: with_item(x, _zeros(x), x[:3]), lambda x: x.gather(3, x.long()), lambda x: x.scatter(3, x.long(), x),
    lambda x: F.dropout(x, 0.1), lambda x: split_rows(x, _zeros(x), 3, 1), lambda x: join_rows([x, x], 22, _zeros(x)),
    lambda x: x.softmax(-1), lambda x: x.log_softmax(-1), lambda x: x.cumsum(1), lambda x: x.flip(2),
    lambda x: x.roll(1, 2),
    lambda x: torch.max(x, -x), lambda x: torch.min(x, -x), lambda x: x.mean(-1),
    lambda x: F.layer_norm(x, (4,)), lambda x: F.rms_norm(x, (4,)),
    lambda x: F.linear(x, x[0, 0]), lambda x: torch.matmul(x, x.transpose(2, 3)),
    lambda x: F.embedding(x.long(), x[0, 0]), lambda x: F.scaled_dot_product_attention(x, x, x),
    lambda x: experts(x[0, 0], x[0, 0, :, :2].long(), x[0, 0, :, :2], x[0, 0].view(3, 2, 4), x[0, 0, :3, :, None],
                      None, None, (("silu", "gate"), ("mul", "%0", "up")), "halves", False, 3),
    lambda x: F.conv1d(x[0], x[0, :, :, :3]), lambda x: F.pad(x, (1, 1)),
    lambda x: F.cross_entropy(x.flatten(0, 2), x[..., 0].flatten().long()),
)  # fmt: skip
NOT_OF_EXPRESSIONS = {("matmuls", "cache_update"), ("matmuls", "cache_read")}  # methods of a cache


def test_expressions_give_every_declared_kind_and_no_other(emitted: Emitted) -> None:
    """Declares elementwise ops by the table itself."""
    for function in EXPRESSIONS:
        build_op_graph(normalized(_Expression(function), x=("B", "S", 6, 4)))
    build_op_graph(normalized(_Modules(), x=("B", "S", 6, 4)))
    assert emitted <= DECLARED
    assert {(file, kind) for file, kind in DECLARED - emitted if file != "elementwise"} == NOT_OF_EXPRESSIONS
