"""Writes the man page, in roff."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from autodist_fx.cli.parser import DESCRIPTION, EXIT_CODES, PROGRAM
from autodist_fx.cli.reference.environment import ENVIRONMENT
from autodist_fx.cli.reference.facts import CommandFacts, OptionFacts
from autodist_fx.own_version import own_version


def man_page(commands: Sequence[CommandFacts]) -> str:
    """Write section 1's page of the whole command line."""
    lines = [
        f'.TH {PROGRAM.upper()} 1 "" "{PROGRAM} {own_version()}" "User Commands"',
        *_section("NAME", f"{_text(PROGRAM)} \\- split a Hugging Face model over ranks"),
        *_section("SYNOPSIS", f".B {_text(PROGRAM)}\n.I COMMAND\n[options]"),
        *_section("DESCRIPTION", _text(DESCRIPTION)),
        ".SH COMMANDS",
        *(line for command in commands for line in _command(command)),
        *_section("EXIT STATUS", *(_entry(f"\\fB{code}\\fR", meaning) for code, meaning in EXIT_CODES)),
        *_section("ENVIRONMENT", *(_entry(f"\\fB{_text(name)}\\fR", meaning) for name, meaning in ENVIRONMENT)),
    ]
    return "\n".join(lines) + "\n"


def _section(title: str, *parts: str) -> list[str]:
    return [f".SH {title}", *parts]


def _command(command: CommandFacts) -> Iterable[str]:
    yield f'.SS "{PROGRAM} {command.name}"'
    for paragraph in command.description.split("\n\n"):
        is_table = any(line.startswith(" ") for line in paragraph.splitlines())
        yield from (".PP", ".nf", _text(paragraph), ".fi") if is_table else (".PP", _text(paragraph))
    for title, options in command.groups:
        yield from (".PP", f"\\fI{_text(title)}\\fR")
        yield from (_entry(_usage(option), option.summary) for option in options)
    if command.examples:
        yield from (".PP", "\\fIexamples\\fR")
        yield from (_entry(_text(line), meaning) for line, meaning in command.examples)


def _usage(option: OptionFacts) -> str:
    flags = ", ".join(f"\\fB{_text(flag)}\\fR" for flag in option.flags)
    return " ".join(part for part in (flags, f"\\fI{_text(option.metavar)}\\fR" if option.metavar else "") if part)


def _entry(head: str, text: str) -> str:
    """Write a tagged paragraph; `head` is roff already."""
    return f".TP\n{head}\n{_text(text)}"


def _text(text: str) -> str:
    """Escape what roff would read as its own: backslashes, hyphens, and dots and quotes that begin a line."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join(f"\\&{line}" if line.startswith((".", "'")) else line for line in escaped.splitlines())
