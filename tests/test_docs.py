"""Documents name files, folders and functions that are there, and commands that the parser takes."""

from __future__ import annotations

import argparse
import functools
import re
import shlex
from pathlib import Path, PurePosixPath

import pytest

from autodist_fx.cli.commands import COMMANDS
from autodist_fx.cli.parser import parser_of

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("autodist_fx", "passes", "cost_model", "tests", "benchmarks", "tools", "docs", "typings", ".github", ".ci",
           "examples")  # fmt: skip
ENDINGS = (".py", ".md", ".json", ".txt", ".js", ".css", ".toml")
TEMPLATE = re.compile(r"[<{A-Z*]")  # NAME, <family>, rankR: no file's own name
MADE = re.compile(  # what our programs or transformers write or read, beside what is in the repository
    r"(manifest|plan|model|config|generation_config|variant|graph|rank\d*|index|split)\.json|.*\.index\.json|dump.*|/tmp/.*"
    r"|lesson_\d\.(py|ipynb)"
)


@functools.cache
def paths() -> frozenset[str]:
    """Every file and folder of the repository, and each of its endings: "comm/links.py", "links.py"."""
    files = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if "__pycache__" not in p.parts]
    files += [p for p in ROOT.iterdir() if p.is_file()]
    files += [ROOT / folder for folder in FOLDERS]
    parts = [PurePosixPath(p.relative_to(ROOT)).parts for p in files]
    return frozenset("/".join(p[i:]) for p in parts for i in range(len(p)))


@functools.cache
def words() -> frozenset[str]:
    """Every identifier in the code and in what configures it."""
    files = [p for folder in FOLDERS[:6] for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".json", ".js")]
    files += [ROOT / "pyproject.toml", ROOT / "Makefile"]
    return frozenset(word for p in files for word in re.findall(r"[A-Za-z_]\w*", p.read_text(encoding="utf-8")))


def in_code(document: Path) -> list[str]:
    """Returns each text of a document between single backticks."""
    text = re.sub(r"(?ms)^```.*?^```", "", document.read_text(encoding="utf-8"))
    return [" ".join(said.split()) for said in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def names_no_file(said: str) -> bool:
    is_path = re.fullmatch(r"[\w./-]+", said) is not None and (said.endswith(ENDINGS) or said.endswith("/"))
    if not is_path or TEMPLATE.search(said) or MADE.fullmatch(said) or said.startswith(("/", "~", "./")):
        return False
    return said.rstrip("/") not in paths()


def names_no_code(said: str) -> bool:
    """An identifier with an underscore, dotted or called, that stands nowhere in the code."""
    plain = re.fullmatch(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\(.*\))?", said)
    is_code = plain is not None and not MADE.fullmatch(said)
    return is_code and any("_" in name and name not in words() for name in plain[1].split("."))


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(d.relative_to(ROOT)) for d in DOCUMENTS])
def test_named_files_and_functions_exist(document: Path) -> None:
    assert [said for said in in_code(document) if names_no_file(said)] == []
    assert [said for said in in_code(document) if names_no_code(said)] == []


@functools.cache
def parsers() -> dict[str, argparse.ArgumentParser]:
    return {command.name: parser_of(command) for command in COMMANDS}


def commands_of(document: Path) -> list[str]:
    """Returns the command lines of ours that a document shows as code, without what stands behind them."""
    text = document.read_text(encoding="utf-8")
    lines = re.findall(r"(?m)^ *(?:\$ )?(autodist-fx [a-z].*)$", text)
    return [re.split(r"  +| [|>#] ", line)[0].replace(" ...", " x") for line in lines]


def refused(line: str) -> str:
    """Returns why the parser does not take a command line, "" where it does."""
    name, *words = shlex.split(line)[1:]
    if name not in parsers():
        return f"{line}: no command {name}"
    try:
        parsers()[name].parse_args(words)
    except SystemExit:
        return f"{line}: see stderr"
    return ""


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(d.relative_to(ROOT)) for d in DOCUMENTS])
def test_commands_that_documents_show_parse(document: Path) -> None:
    shown = [line for line in commands_of(document) if "torchrun" not in line and "|throughput" not in line]
    assert [why for line in shown if (why := refused(line))] == []
