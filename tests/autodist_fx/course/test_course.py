"""The course: answers pass and holes fail, common mistakes are found, pages and notebooks are of the lessons' texts."""

import json
import re
from pathlib import Path

import pytest

from autodist_fx.cli.main import main
from autodist_fx.course.grading import Mark, grade_text
from autodist_fx.course.lessons import LESSONS, lesson
from autodist_fx.course.notebook import make_notebook, make_page
from tests.support.command_line import fails, succeeds

DOCS = Path(__file__).resolve().parents[3] / "docs" / "course"
every_lesson = pytest.mark.parametrize("number", [each.number for each in LESSONS])

# Mistakes that people make, as (lesson, what the answer says, what they write): some check fails.
MISTAKES = {
    "the send at the end": (1, "inserting_after(value)", 'inserting_before(node_called(stage, "output"))'),
    "the placeholder stays": (1, "    stage.graph.erase_node(placeholder)\n", ""),
    "another channel": (1, "hop.source, hop.channel))", "hop.source, 0))"),
    "layers counted, not seconds": (2, "max(best[cut][0], ends[n] - ends[cut])", "max(best[cut][0], n - cut)"),
    "a hop for each reader": (2, "hops.setdefault((read.name, target), hop)", "hops[read.name, node.name] = hop"),
    "one hop for all stages": (2, "hops.setdefault((read.name, target), hop)", "hops.setdefault((read.name, 0), hop)"),
    "weights cross": (2, 'graph.node_copy(read) if read.op == "get_attr" else ', ""),
    "the larger shares last": (3, "(tp_rank < left)", "(tp_rank >= tp - left)"),
    "each rank adds the bias": (3, "linear.bias is not None and tp_rank == 0", "linear.bias is not None"),
    "a view of the whole": (3, "linear.weight[outputs].detach().clone()", "linear.weight[outputs].detach()"),
    "rows for columns": (3, "linear.weight[:, inputs]", "linear.weight[inputs]"),
    "a sum behind columns": (3, "isinstance(module.get_submodule(node.target), RowParallelLinear)", "True"),
    "query heads dealt": (4, "heads.start * of_queries, heads.stop", "heads.start * of_key, heads.stop"),
    "everything by columns": (4, '"row" if name in ("o_proj", "down_proj")', '"column" if name == "o_proj"'),
    "GPipe": (5, "ahead = ranks - rank", "ahead = microbatches"),
    "a warm-up too short": (5, "ahead = ranks - rank ", "ahead = ranks - rank - 1 "),
    "a bubble of its own": (5, "(ranks - 1) / (microbatches + ranks - 1)", "(ranks - 1) / microbatches"),
    "a sum of losses": (5, "self.loss(y, m) / len(self.inputs)", "self.loss(y, m)"),
    "microbatches are kept": (5, "self.kept.pop(m)", "self.kept[m]"),
}


@every_lesson
def test_the_answer_passes(number):
    report = grade_text(lesson(number), lesson(number).answer)
    assert report.passed, str(report)


@every_lesson
def test_each_open_hole_fails(number):
    asked = lesson(number)
    for hole in range(asked.holes):
        report = grade_text(asked, asked.problem({hole}))
        assert not report.passed, str(report)
        assert {verdict.mark for verdict in report.verdicts} <= {Mark.RIGHT, Mark.HOLE}, str(report)


@every_lesson
def test_of_the_problem_nothing_passes(number):
    asked = lesson(number)
    report = grade_text(asked, asked.problem())
    assert {verdict.mark for verdict in report.verdicts} == {Mark.HOLE}, str(report)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake):
    number, right, wrong = MISTAKES[mistake]
    assert lesson(number).answer.count(right) == 1, "the answer has no such line"
    report = grade_text(lesson(number), lesson(number).answer.replace(right, wrong))
    assert not report.passed and all(v.mark is not Mark.HOLE for v in report.verdicts)


def test_a_deadlock_is_told():
    answer = lesson(1).answer.replace("hop.source, hop.channel))", "hop.source, hop.channel + 1))")
    assert "deadlock: none of the 2 ranks" in str(grade_text(lesson(1), answer))


def test_what_python_refuses_is_told_by_line():
    report = grade_text(lesson(3), "x = 1\ndef f(:\n", "mine.py")
    assert [v.mark for v in report.verdicts] == [Mark.WRONG] and "mine.py:2: SyntaxError" in str(report)
    report = grade_text(lesson(3), "x = 1\ny = z\n", "mine.py")
    assert "mine.py:2: NameError: name 'z' is not defined" in str(report)
    broken = lesson(3).answer.replace("divmod(size, tp)", "divmod(size, 0)")
    assert re.search(r"lesson_3\.py:\d+, share: ZeroDivisionError", str(grade_text(lesson(3), broken)))


def test_the_command_line(capsys, tmp_path):
    assert succeeds(capsys, "course", "list").count("\n") == len(LESSONS) + 2
    assert "with 4 holes to fill in" in succeeds(capsys, "course", "start", 3, tmp_path)
    file = tmp_path / "lesson_3.py"
    assert main(["course", "check", "3", str(file)]) == 1
    said = capsys.readouterr().out
    assert "0 of 8 right" in said and f"{file}:" in said
    file.write_text(lesson(3).answer)
    assert "8 of 8 right" in succeeds(capsys, "course", "check", 3, file)
    assert json.loads((tmp_path / "lesson_3.ipynb").read_text()) == make_notebook(lesson(3))
    assert "is there already" in fails(capsys, "course", "start", 3, tmp_path)
    assert "which lesson? `autodist-fx course check 1`" in fails(capsys, "course", "check")
    assert "course start 1`" in fails(capsys, "course", "check", 1, tmp_path / "nowhere.py")


@every_lesson
def test_page_and_notebook_are_of_the_text(number):
    """They were made of the text that is here (`make course`), by running it."""
    asked = lesson(number)
    notebook = json.loads((DOCS / f"{asked.page}.ipynb").read_text(encoding="utf-8"))
    fresh = make_notebook(asked)
    assert [("".join(c["source"]), c["id"]) for c in notebook["cells"]] == [
        ("".join(c["source"]), c["id"]) for c in fresh["cells"]
    ]
    assert [c["execution_count"] for c in notebook["cells"] if c["cell_type"] == "code"] == [
        n + 1 for n in range(sum(c["cell_type"] == "code" for c in fresh["cells"]))
    ]
    drawn = {}

    def save(n, svg):
        drawn[f"images/lesson_{number}_{n}.svg"] = svg + "\n"
        return f"images/lesson_{number}_{n}.svg"

    assert make_page(notebook, save) == (DOCS / f"{asked.page}.md").read_text(encoding="utf-8")
    assert drawn == {f"images/{p.name}": p.read_text(encoding="utf-8") for p in DOCS.glob(f"images/lesson_{number}_*")}
