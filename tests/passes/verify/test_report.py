"""The verdict's words: the pass that is to blame is read off the nodes' stamps; ten lines of graph stand under it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.fx import Node

from autodist_fx.cli import main as cli
from cost_model.errors import AutodistError, VerificationError
from cost_model.partition_plan import PartitionPlan
from passes.fx import node_meta
from passes.fx.node_meta import Stamp
from passes.fx.text import node_text
from passes.op_graph.build import build_op_graph
from passes.partition.pipeline import emit_rank
from passes.program.rank_program import RankProgram
from passes.verify.core.report import Duty, fail
from passes.verify.verify import verify
from tests.support.graphs.small import Attention, Mlp, Stack, normalized, plan_for

ROOT = Path(__file__).parents[3]


def programs_of(module: torch.nn.Module, **mesh: int) -> tuple[list[RankProgram], PartitionPlan, torch.fx.GraphModule]:
    whole = normalized(module, x=("B", "S", 12))
    plan = plan_for(whole, **mesh)
    return [emit_rank(whole, plan, rank) for rank in range(plan.mesh.size)], plan, whole


def verdict(
    broken: Callable[[Node], bool], change: Callable[[Node], None], module: torch.nn.Module, **mesh: int
) -> VerificationError:
    """Returns what verify says when the first such node of each rank is changed."""
    programs, plan, whole = programs_of(module, **mesh)
    for program in programs:
        found = next((n for n in program.graph_module.graph.nodes if broken(n)), None)
        if found is not None:
            change(found)
    with pytest.raises(VerificationError) as caught:
        verify(programs, plan, build_op_graph(whole), whole)
    return caught.value


def to_blame(error: VerificationError) -> str:
    (file,) = re.findall(r"this is a bug in (\S+): please", str(error))
    return str(file)


def _take_out(node: Node) -> None:
    node.replace_all_uses_with(node.args[0])
    node.graph.erase_node(node)


def _other_size(node: Node) -> None:
    shape = list(node.args[1])
    shape[2] += 1
    node.args = (node.args[0], tuple(shape))


def _reads_the_input(node: Node) -> None:
    x = next(n for n in node.graph.nodes if n.op == "placeholder")
    node.args = (x, x)


def test_a_wrong_number_is_blamed_on_the_pass_that_wrote_it() -> None:
    error = verdict(lambda n: n.target is torch.reshape and len(n.args[1]) == 4, _other_size, Attention(), tp=2)
    assert to_blame(error) == "passes/partition/localize_shapes.py"


def test_a_lost_collective_is_blamed_on_the_pass_whose_duty_it_is() -> None:
    error = verdict(lambda n: n.name.startswith("all_reduce"), _take_out, Mlp(12), tp=2)
    assert to_blame(error) == Duty.COLLECTIVES.value == "passes/partition/insert_collectives.py"


def test_a_collective_of_its_own_is_blamed_by_its_stamp() -> None:
    def double(node: Node) -> None:
        with node.graph.inserting_after(node):
            again = node.graph.call_function(node.target, (node,), dict(node.kwargs))
        node_meta.copy(node, again)
        node_meta.set_stamp(again, Stamp("partition/another_pass", "partition/another_pass"))
        node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)

    error = verdict(lambda n: n.name.startswith("all_reduce"), double, Mlp(12), tp=2)
    assert to_blame(error) == "passes/partition/another_pass.py"


def test_a_wrong_input_is_blamed_on_the_pass_that_rewired_the_node() -> None:
    error = verdict(lambda n: n.name == "add", _reads_the_input, Mlp(12), tp=2)
    assert "input 1 is x where the model's op reads down" in str(error)
    assert to_blame(error) == "passes/partition/insert_collectives.py"
    error = verdict(lambda n: n.name == "add", _reads_the_input, Mlp(12), tp=1)  # as it was copied
    assert to_blame(error) == "passes/partition/extract_stage.py"


def test_an_unchanged_node_is_blamed_on_the_pass_whose_duty_it_was() -> None:
    def as_the_model_has_it(node: Node) -> None:
        _other_size(node)
        node_meta.set_stamp(node, Stamp("partition/extract_stage", "partition/insert_collectives"))

    error = verdict(lambda n: n.target is torch.reshape and len(n.args[1]) == 4, as_the_model_has_it, Attention(), tp=2)
    assert to_blame(error) == Duty.SIZES.value


def test_every_duty_names_a_file() -> None:
    assert all((ROOT / duty.value).is_file() for duty in Duty)


def test_no_check_names_a_pass_by_its_path() -> None:
    own = ROOT / "passes/verify/core/report.py"
    found = [
        f"{path.name}:{number}"
        for path in sorted((ROOT / "passes/verify").rglob("*.py"))
        if path != own
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if re.search(r"\"(passes|cost_model)/[a-z_/]+\.py", line)
    ]
    assert found == []


def test_ten_lines_of_the_graph_stand_under_the_verdict_which_is_one_line() -> None:
    programs, _, _ = programs_of(Stack([Attention(), Mlp(12)]), tp=2)
    nodes = list(programs[1].graph_module.graph.nodes)
    assert len(nodes) > 12
    for at, first in ((0, 0), (8, 3), (len(nodes) - 1, len(nodes) - 10)):
        with pytest.raises(VerificationError) as caught:
            fail(programs[1], nodes[at], "is wrong")
        assert "\n" not in str(caught.value)
        (note,) = caught.value.__notes__
        head, *lines = note.splitlines()
        assert head == f"around {nodes[at].name} in the graph of rank 1:" and len(lines) == 10
        assert [line[2:] for line in lines] == [
            node_text(programs[1].graph_module, n) for n in nodes[first : first + 10]
        ]
        assert [line[0] for line in lines].index(">") == at - first


def test_the_command_line_prints_the_lines_indented_under_its_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = AutodistError("rank 0: mul is wrong")
    error.add_note("around mul:\n  x = input\n> mul = mul(x)")

    def raise_it(args: object) -> int:
        raise error

    monkeypatch.setattr("autodist_fx.cli.plans.show.run", raise_it)
    assert cli.main(["show", "plan.json"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "autodist-fx: error: rank 0: mul is wrong", "    around mul:", "      x = input", "    > mul = mul(x)",
    ]  # fmt: skip
