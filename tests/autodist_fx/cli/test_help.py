"""--help: commands in groups, examples that parse, exit codes; colours where they belong, and nowhere else."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys

import pytest
from rich.console import Console

from autodist_fx.cli.commands import COMMANDS, GROUPS, Command
from autodist_fx.cli.main import main
from autodist_fx.cli.parser import examples_of, parser_of
from autodist_fx.report.terminal import print_plan
from tests.support.plans.examples import small_plan


def helps(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_commands_are_listed_by_group_without_importing_torch() -> None:
    program = (
        "import sys; from autodist_fx.cli.main import main\n"
        "try: main(['--help'])\nfinally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert [line[:-1] for line in said if line[:-1] in GROUPS] == list(GROUPS)
    groups = said[said.index(f"{GROUPS[0]}:") : said.index("options:")]
    listed = [line.split()[0] for line in groups if line[:2] == "  "]
    assert listed == [command.name for command in COMMANDS]
    assert "exit codes:" in said and any(line.split()[:1] == ["130"] for line in said)


@pytest.mark.parametrize("command", COMMANDS, ids=[command.name for command in COMMANDS])
def test_each_command_has_help_with_examples_that_parse(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    said = helps(capsys, command.name)
    assert "examples:" in said and max(map(len, said.split("examples:")[0].splitlines())) <= 90
    parsed = 0
    for line, _ in examples_of(command):
        words = shlex.split(line.split(" | ")[0].split(" > ")[0])
        if words[0] == "autodist-fx" and words[1] == command.name:
            parser_of(command).parse_args(words[2:])
            parsed += 1
    assert parsed or command.name == "completion"


@pytest.mark.parametrize("environment, coloured", [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colours_of_a_plan_in_a_terminal(
    environment: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm"} | environment).items():
        monkeypatch.setenv(name, value)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    output = Terminal()
    print_plan(small_plan(), Console(file=output, width=120))
    assert ("\x1b[34m" in output.getvalue()) == coloured, "column is blue"


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("autodist-fx ")
