"""Op rules as text: the golden file shows the rule of every kind, and the documents show lines of it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from cost_model.rules.rule import DimLink, Factor, OpRule
from cost_model.rules.table import RULES
from tests.support.rule_cases.samples import SAMPLES

GOLDEN = Path(__file__).with_name("op_rules.txt")
ROOT = Path(__file__).parents[3]
HEADER = """\
# The rule of every kind of op, at sample shapes (tests/support/rule_cases/samples.py); the notation is explained at
# OpRule.__str__. Written anew by EXPECTTEST_ACCEPT=1 python -m pytest tests/cost_model/rules/test_notation.py
"""


def golden_text() -> str:
    lines = sorted((str(sample), str(sample.rule)) for sample in SAMPLES)
    width = max(len(sample) for sample, _ in lines)
    return HEADER + "".join(f"{sample:<{width}}  {rule}\n" for sample, rule in lines)


def test_the_golden_file_shows_the_rule_of_every_kind() -> None:
    text = golden_text()
    if os.environ.get("EXPECTTEST_ACCEPT"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert GOLDEN.read_text(encoding="utf-8") == text
    assert {sample.kind for sample in SAMPLES} == set(RULES)


@pytest.mark.parametrize(
    "path",
    ["docs/design.md", ".github/CONTRIBUTING.md", "cost_model/rules/table.py", "cost_model/rules/convolutions.py"],
)
def test_documents_show_rules_as_they_are(path: str) -> None:
    shown = re.findall(r"^ {4,}(\w+) +(\S.*->.*\])( +\{.*\})?", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    golden = {(s.kind, str(s.rule)) for s in SAMPLES}
    rules = [(kind, rule + notes) for kind, rule, notes in shown if kind in RULES]
    assert len(rules) >= 2 and set(rules) <= golden


def link(own: list[int], factor: list[int], cover: bool = False) -> DimLink:
    return DimLink(0, 0, (np.array(own, dtype=np.int64), np.array(factor, dtype=np.int64)), cover)


@pytest.mark.parametrize(
    "size, factor_size, dim, text",
    [
        (6, 6, DimLink(0, 0), "[a]"),
        (3, 8, link([0, 1, 2], [4, 5, 6]), "[a[4:7]]"),
        (8, 3, link([2, 3, 4], [0, 1, 2]), "[a@2:5]"),
        (8, 3, link([1, 3, 5], [0, 1, 2]), "[a@1:6:2]"),
        (2, 6, link([0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 4, 5], cover=True), "[a/3]"),
        (6, 2, link([0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 1]), "[(a 3)]"),
        (6, 2, link([0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 0, 1]), "[(3 a)]"),
        (12, 2, link(list(range(12)), [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1]), "[(2 a 3)]"),
        (4, 1, link([0, 1, 2, 3], [0, 0, 0, 0]), "[(a 4)]"),
        (4, 4, link([0, 1, 2, 3], [3, 1, 0, 2]), "[a*]"),
    ],
)
def test_how_the_elements_of_a_dim_go_with_a_factor(size: int, factor_size: int, dim: DimLink, text: str) -> None:
    rule = OpRule((Factor("a", factor_size, (dim,), ()),), (), ((size,),), ())
    assert str(rule) == f"{text} -> ()"
