"""`autodist-fx verify`, in each of its forms: of what is right, and of programs that are broken behind its back."""

import json
import shutil

import pytest
from torch.fx import Node

import autodist_fx as adx
from autodist_fx.cli.main import main
from autodist_fx.compiler import compilation
from passes.ops.comm import all_reduce, copy_to_tp
from passes.program.rank_program import RankProgram
from tests.support.artifacts import edit_json
from tests.support.command_line import fails, refuses, succeeds
from tests.support.models import tiny_model

WHERE = r"rank 0 (stage 0, tp rank 0)"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("artifact") / "saved"
    adx.compile(tiny_model("llama"), tp=2, use_cache=True).save(directory)
    return directory


@pytest.fixture
def lose(monkeypatch):
    """lose(target): every rank's program comes without the first node that calls it."""

    def patch(target):
        def emit(*args, **keywords) -> RankProgram:
            program = emit_rank(*args, **keywords)
            node: Node = next(n for n in program.graph_module.graph.nodes if n.target is target)
            node.replace_all_uses_with(node.args[0])
            node.graph.erase_node(node)
            program.graph_module.recompile()
            return program

        emit_rank = compilation.emit_rank
        monkeypatch.setattr(compilation, "emit_rank", emit)

    return patch


@pytest.fixture
def trusting(monkeypatch):
    """The proof says yes to everything: what then comes is the numeric check's."""
    monkeypatch.setattr(compilation, "verify_programs", lambda *_: None)


def damaged(directory):
    """Leaves out the sum behind the first row-parallel product of the saved rank 1, with digests made anew."""

    def change(graph):
        graph = graph["graph"]
        node = next(n for n in graph["nodes"] if n["target"] == "comm.all_reduce")
        text = json.dumps(graph["nodes"]).replace(json.dumps({"node": node["name"]}), json.dumps(node["args"][0]))
        graph["nodes"] = [n for n in json.loads(text) if n["name"] != node["name"]]

    edit_json(directory, "variants/decode/rank1.json", change)


@pytest.mark.drawn(1)
@pytest.mark.parametrize("options", [(), ("--numeric",), ("--train",), ("--train", "--numeric")], ids="".join)
def test_a_model(capsys, config_only, options):
    said = succeeds(capsys, "verify", "--model", config_only, "--tp", 2, *options).splitlines()
    assert said[0].startswith("LlamaForCausalLM on tp=2 x pp=1: the programs of 2 ranks made and verified in ")
    numeric = "run in float64 against the model's own graph: all that leaves a rank is equal ("
    assert [line.startswith(numeric) for line in said[1:]] == ([True] if "--numeric" in options else [])


@pytest.mark.parametrize("options", [(), ("--numeric",), ("--train",)], ids="".join)
def test_a_sum_that_is_lost(capsys, config_only, lose, options):
    lose(all_reduce)
    said = refuses(capsys, "verify", "--model", config_only, "--tp", 2, *options)
    assert WHERE in said and "still owed" in said


def test_a_gradient_that_is_not_added_up(capsys, config_only, lose):
    lose(copy_to_tp)
    said = refuses(capsys, "verify", "--model", config_only, "--tp", 2, "--train")
    assert WHERE in said and "nothing adds them up (copy_to_tp)" in said


@pytest.mark.parametrize(("options", "target", "message"), [
    pytest.param(("--numeric",), all_reduce, "logits of rank 0 differs", id="numeric"),
    pytest.param(("--train", "--numeric"), copy_to_tp, "rank 0 ends with another gradient of", id="train-numeric"),
])  # fmt: skip
def test_numbers_that_differ(capsys, config_only, lose, trusting, options, target, message):
    lose(target)
    assert main(["verify", "--model", str(config_only), "--tp", "2", *options]) == 2
    said = capsys.readouterr()
    assert "made and verified" in said.out and "is equal" not in said.out
    first, *lines = said.err.splitlines()
    assert message in first and all(line.startswith("    ") for line in lines)


@pytest.mark.parametrize("options", [(), ("--numeric",)], ids="".join)
def test_an_artifact(capsys, saved, options):
    said = succeeds(capsys, "verify", "--artifact", saved, *options).splitlines()
    assert said[0].startswith("LlamaForCausalLM on tp=2 x pp=1: the programs of 2 ranks read and verified in ")
    assert len(said) == 1 + len(options)


@pytest.mark.parametrize("options", [(), ("--numeric",)], ids="".join)
def test_a_damaged_artifact(capsys, saved, tmp_path, options):
    shutil.copytree(saved, tmp_path / "saved")
    damaged(tmp_path / "saved")
    said = refuses(capsys, "verify", "--artifact", tmp_path / "saved", *options)
    assert "rank 1 (stage 0, tp rank 1), all_reduce_1" in said and "one of them is missing" in said


def test_a_damaged_artifact_of_which_the_numbers_differ(capsys, saved, tmp_path, trusting):
    shutil.copytree(saved, tmp_path / "saved")
    damaged(tmp_path / "saved")
    assert main(["verify", "--artifact", str(tmp_path / "saved"), "--numeric"]) == 2
    said = capsys.readouterr()
    first, *lines = said.err.splitlines()
    assert "read and verified" in said.out and "run in float64, the ranks fail" in first
    assert len(lines) == 11 and all(line.startswith("    ") for line in lines)


def test_verify_takes_a_model_or_an_artifact(capsys, config_only, saved):
    for argv in ((), ("--model", config_only, "--artifact", saved), ("--artifact", saved, "--train")):
        assert "name a model with --model, or a split on disk with --artifact" in fails(capsys, "verify", *argv)
