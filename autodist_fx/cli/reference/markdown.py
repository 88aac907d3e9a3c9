"""Writes the reference of the command line in Markdown, for the site."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from autodist_fx.cli.commands import GROUPS
from autodist_fx.cli.parser import DESCRIPTION, EXIT_CODES, PROGRAM
from autodist_fx.cli.reference.environment import ENVIRONMENT
from autodist_fx.cli.reference.facts import CommandFacts, OptionFacts


def markdown(commands: Sequence[CommandFacts]) -> str:
    """Write the page: a list of the commands by group, a section for each, exit codes and environment."""
    lines = ["# Command line", "", DESCRIPTION, ""]
    for group in GROUPS:
        lines += [f"**{group.capitalize()}**", ""]
        lines += [f"- [`{c.name}`](#{_anchor(c)}): {_cell(c.summary)}" for c in commands if c.group == group]
        lines.append("")
    lines += [line for command in commands for line in _command(command)]
    for title, names, facts in (("Exit codes", "code", EXIT_CODES), ("Environment", "variable", ENVIRONMENT)):
        lines += [f"## {title}", "", *_table((names, "meaning"), ((f"`{name}`", said) for name, said in facts)), ""]
    return "\n".join(lines) + "\n"


def _anchor(command: CommandFacts) -> str:
    return f"{PROGRAM}-{command.name}"


def _command(command: CommandFacts) -> Iterable[str]:
    yield from (f"## {PROGRAM} {command.name} {{#{_anchor(command)}}}", "")
    for paragraph in command.description.split("\n\n"):
        is_table = any(line.startswith(" ") for line in paragraph.splitlines())
        yield from (*(["```text", *paragraph.splitlines(), "```"] if is_table else [_escaped(paragraph)]), "")
    for title, options in command.groups:
        rows = [(_usage(option), _cell(option.summary)) for option in options if "--help" not in option.flags]
        if rows:
            yield from (*_table((title, ""), rows), "")
    if command.examples:
        yield from ("```sh", *(f"{line}    # {meaning}" for line, meaning in command.examples), "```", "")


def _usage(option: OptionFacts) -> str:
    said = html.escape(option.usage).replace("|", "&#124;")  # in a table a bar ends the cell, also in backticks
    return f"<code>{said}</code>" + (" (required)" if option.is_required else "")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(row)} |" for row in rows)]


def _cell(text: str) -> str:
    return _escaped(text).replace("|", "\\|")


def _escaped(text: str) -> str:
    """Let stars, underscores and angle brackets be themselves outside of code."""
    parts = text.split("`")
    kept = [part if n % 2 else _plain(part) for n, part in enumerate(parts)]
    return "`".join(kept)


def _plain(text: str) -> str:
    for mark in "*_<":
        text = text.replace(mark, f"\\{mark}")
    return text
