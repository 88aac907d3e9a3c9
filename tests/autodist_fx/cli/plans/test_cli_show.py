"""`autodist-fx show`: tables, a page or a graph of a plan file, without torch; errors of one line."""

import subprocess
import sys

import pytest

from autodist_fx.cli.main import main
from autodist_fx.report.dot import plan_dot
from autodist_fx.report.page import plan_page
from tests.support.plans.examples import small_plan


@pytest.fixture
def plan_file(tmp_path):
    path = tmp_path / "plan.json"
    small_plan().save(path)
    return path


def test_tables_by_default(capsys, plan_file):
    assert main(["show", str(plan_file)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("LlamaForCausalLM on tp=2 x pp=2") and "model.layers.*.mlp.up_proj" in said
    assert "\x1b" not in said  # no colours where it is no terminal


def test_a_page_and_a_graph(capsys, plan_file, tmp_path):
    page, graph = tmp_path / "plan.html", tmp_path / "plan.dot"
    assert main(["show", str(plan_file), "--html", str(page), "--dot", str(graph)]) == 0
    said = capsys.readouterr()
    assert said.out == "" and said.err == f"wrote {page}\nwrote {graph}\n"
    assert page.read_text(encoding="utf-8") == plan_page(small_plan())
    assert graph.read_text(encoding="utf-8") == plan_dot(small_plan())


def test_to_standard_output(capsys, plan_file):
    assert main(["show", str(plan_file), "--dot", "-"]) == 0
    assert capsys.readouterr().out == plan_dot(small_plan())


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["/nowhere/plan.json"], "cannot read the plan file /nowhere/plan.json"),
        (["{not_a_plan}"], "not JSON"),
        (["{plan}", "--html", "/nowhere/x.html"], "cannot write /nowhere/x.html: No such file or directory"),
    ],
)
def test_errors_are_one_line(capsys, plan_file, tmp_path, arguments, error):
    broken = tmp_path / "broken.json"
    broken.write_text("{", encoding="utf-8")
    assert main(["show", *(a.format(plan=plan_file, not_a_plan=broken) for a in arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and error in said.err and len(said.err.splitlines()) == 1


@pytest.mark.parametrize("plan, code", [("{plan}", 0), ("/nowhere", 2)])
def test_torch_is_not_imported(plan_file, tmp_path, plan, code):
    program = (
        "import sys; from autodist_fx.cli.main import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    arguments = ["show", plan.format(plan=plan_file), "--html", str(tmp_path / "x.html")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
