"""explain, diff and graph-diff on the command line: exit codes, JSON, and that plans are read without torch."""

import json
import subprocess
import sys

import pytest
import torch

import autodist_fx as adx
from autodist_fx.cli.main import main
from cost_model.graph.roles import MEANING, ROLES
from cost_model.partition_plan import PartitionPlan
from tests.support.command_line import fails, succeeds
from tests.support.moe import experts_are_modules, tiny_moe_model
from tests.support.plans.examples import small_plan


@pytest.fixture
def plans(tmp_path):
    small_plan().save(tmp_path / "a.json")
    small_plan(4, 1, 4).save(tmp_path / "b.json")
    return tmp_path / "a.json", tmp_path / "b.json"


def test_explain(capsys, plans):
    whole = succeeds(capsys, "explain", plans[0])
    assert "The dearest ops" in whole and "LlamaForCausalLM on tp=2 x pp=2" in whole
    both = succeeds(capsys, "explain", plans[0], "--op", "q_proj", "--cut", "0")
    assert "self_attn.q_proj: linear, x4" in both and "Cut 0" in both and "The dearest ops" not in both


def test_explain_an_expert_that_lies_on_one_rank(capsys, tmp_path):
    model = tiny_moe_model("qwen3_moe", torch.float64, num_hidden_layers=1, num_experts=4)
    adx.compile(model, tp=2, use_cache=True, verify=False).plan.save(tmp_path / "plan.json")
    op, role = ("*.experts.3.up_proj", "expert") if experts_are_modules(model) else ("*.experts", "experts")
    said = succeeds(capsys, "explain", tmp_path / "plan.json", "--op", op)
    assert f"role         {role}: {MEANING[role]}" in said
    assert ("whole on tp rank 1 alone" in said) == experts_are_modules(model)
    assert any(line.startswith(f"{role} ") and line.endswith("chosen") for line in said.splitlines())


def test_explain_as_json(capsys, plans):
    facts = json.loads(succeeds(capsys, "explain", plans[0], "--json"))
    assert facts["predicted_seconds"] == pytest.approx(small_plan().predicted_seconds)
    facts = json.loads(succeeds(capsys, "explain", plans[0], "--op", "q_proj", "--cut", "0", "--json"))
    assert [a["role"] for a in facts["ops"][0]["alternatives"]] == ["column", "row", "replicate"]
    assert facts["cut"]["options"][1]["chosen"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--op", "q_porj"], "did you mean q_proj"),
        (["--cut", "7"], "no cut 7: a plan of 2 stages has cut 0 only"),
    ],
)
def test_explain_names_missing_ops_and_cuts(capsys, plans, argv, message):
    assert message in fails(capsys, "explain", plans[0], *argv)


def test_diff_and_its_exit_codes(capsys, plans, tmp_path):
    a, b = plans
    assert main(["diff", str(a), str(a)]) == 0
    assert capsys.readouterr().out == ""
    assert main(["diff", str(a), str(b)]) == 1
    assert "tp=2 x pp=2  tp=1 x pp=4" in capsys.readouterr().out
    assert main(["diff", str(a), str(b), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["settings"][0] == {"name": "mesh", "before": "tp=2 x pp=2", "after": "tp=1 x pp=4"}
    (tmp_path / "c.json").write_text(a.read_text().replace("LlamaForCausalLM", "OPTForCausalLM"))
    assert "different models" in fails(capsys, "diff", a, tmp_path / "c.json")
    assert "cannot read the plan file" in fails(capsys, "diff", a, tmp_path / "none.json")


def test_plans_are_read_without_torch(plans):
    a, b = map(str, plans)
    calls = [["explain", a], ["explain", a, "--op", "q_proj"], ["explain", a, "--op", "nothing"], ["diff", a, b]]
    code = (
        "import sys\nfrom autodist_fx.cli.main import main\n"
        f"codes = [main(argv) for argv in {calls!r}]\n"
        "assert codes == [0, 0, 2, 1], codes\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_graph_diff_counts(capsys, llama):
    out = succeeds(capsys, "graph-diff", "--model", llama, "--tp", 2, "--rank", 1)
    counts = json.loads(succeeds(capsys, "graph-diff", "--model", llama, "--tp", 2, "--rank", 1, "--json"))
    assert f"all_reduce: {counts['inserted']['all_reduce']}" in out
    assert out.count("\n+all_reduce") == counts["inserted"]["all_reduce"]
    columns = counts["replaced"]["Linear -> ColumnParallelLinear"]
    added = [line for line in out.splitlines() if line.startswith("+") and "# ColumnParallelLinear" in line]
    assert len(added) == columns
    assert counts["rank"] == 1


def test_a_plan_that_the_command_makes_is_explained(capsys, llama, tmp_path):
    path = tmp_path / "plan.json"
    succeeds(capsys, "plan", "--model", llama, "--tp", 2, "--pp", 2, "--save", path)
    plan = PartitionPlan.load(path)
    linears = [op for op in plan.ops if op.role]
    assert linears and all(op.choice >= 0 for op in linears)
    for op in {op.module: op for op in linears}.values():
        assert "chosen" in succeeds(capsys, "explain", path, "--op", op.module)
    assert "Cut 0" in succeeds(capsys, "explain", path, "--cut", 0)


def test_each_role_that_an_op_may_have_is_explained():
    assert {role for roles in ROLES.values() for role in roles} | {"replicate"} == MEANING.keys()
