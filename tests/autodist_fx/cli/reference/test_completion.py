"""Completion scripts, asked as their shells ask them; the manual has every option."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from autodist_fx.cli.reference.completion import bash, fish, zsh
from autodist_fx.cli.reference.facts import CommandFacts, read_commands
from autodist_fx.cli.reference.man_page import man_page
from autodist_fx.cli.reference.markdown import markdown


@pytest.fixture(scope="module")
def commands() -> tuple[CommandFacts, ...]:
    return read_commands()


def completed(script: str, words: list[str], cwd: Path) -> set[str]:
    """Returns the words that bash offers for the last one, which is being typed."""
    typed = " ".join(shlex.quote(word) for word in words)
    asked = f"COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _autodist_fx; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(
        ["bash", "--norc", "-c", f"{script}\n{asked}"], capture_output=True, text=True, timeout=30, cwd=cwd
    )
    assert (done.returncode, done.stderr) == (0, "")
    return set(done.stdout.split())


def test_bash_offers_commands_options_values_and_files(commands: tuple[CommandFacts, ...], tmp_path: Path) -> None:
    script = bash(commands)
    (tmp_path / "plan.json").touch()
    asked = {
        ("pl",): {"plan"},
        ("run", "--obj"): {"--objective"},
        ("run", "--objective", "la"): {"latency"},
        ("run", "--no-do"): {"--no-do-sample"},
        ("run", "--tp", ""): set(),
        ("run", "--plan", "pl"): {"plan.json"},
        ("show", "pl"): {"plan.json"},
        ("show", "--ht"): {"--html"},
        ("completion", "fi"): {"fish"},
        ("train", "--tp", "2", "--sched"): {"--schedule"},
    }
    found = {words: completed(script, ["autodist-fx", *words], tmp_path) for words in asked}
    assert found == asked
    assert completed(script, ["autodist-fx", ""], tmp_path) >= {command.name for command in commands}


def test_a_suppressed_option_is_offered_nowhere(commands: tuple[CommandFacts, ...]) -> None:
    for text in (bash(commands), zsh(commands), fish(commands), man_page(commands), markdown(commands)):
        assert "cache-entry" not in text


@pytest.mark.parametrize("shell, write", [("zsh", zsh), ("fish", fish)])
def test_other_shells_read_their_script(commands: tuple[CommandFacts, ...], tmp_path: Path, shell, write) -> None:  # type: ignore[no-untyped-def]
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    path = tmp_path / "script"
    path.write_text(write(commands))
    done = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_manual_has_every_option(commands: tuple[CommandFacts, ...]) -> None:
    page, reference = man_page(commands).replace("\\", ""), markdown(commands)
    for command in commands:
        assert f'.SS "autodist-fx {command.name}"' in page and f"## autodist-fx {command.name} " in reference
        for option in command.options:
            assert all(f"fB{flag}fR" in page and flag in reference for flag in option.flags)


@pytest.mark.skipif(shutil.which("groff") is None, reason="there is no groff here")
def test_roff_has_nothing_to_warn_of(commands: tuple[CommandFacts, ...]) -> None:
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", "-z"], input=man_page(commands), capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (0, "")
