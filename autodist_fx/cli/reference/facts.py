"""Reads every command's parser into values, of which completion scripts, the man page and the reference are made."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass

from autodist_fx.cli.commands import COMMANDS
from autodist_fx.cli.parser import examples_of, parser_of

_FILES = re.compile(r"FILE|DIR|PATH")  # in the metavar of an option that takes a path


@dataclass(frozen=True, slots=True)
class OptionFacts:
    """An option or a positional argument; `flags` of the latter are empty, `metavar` of a switch is."""

    flags: tuple[str, ...]
    metavar: str
    summary: str
    choices: tuple[str, ...]
    is_required: bool

    @property
    def takes_path(self) -> bool:
        """Return whether its value is a file or a directory."""
        return not self.choices and _FILES.search(self.metavar) is not None

    @property
    def usage(self) -> str:
        """Return the option as one types it: "--tp N"."""
        return " ".join(part for part in (", ".join(self.flags), self.metavar) if part)


@dataclass(frozen=True, slots=True)
class CommandFacts:
    """A command: what --help says of it, in parts. `groups` are titled, in order, without those that have nothing."""

    name: str
    group: str
    summary: str
    description: str
    usage: str
    groups: tuple[tuple[str, tuple[OptionFacts, ...]], ...]
    examples: tuple[tuple[str, str], ...]

    @property
    def options(self) -> tuple[OptionFacts, ...]:
        """Return the options and arguments of all groups."""
        return tuple(option for _, options in self.groups for option in options)


def read_commands() -> tuple[CommandFacts, ...]:
    """Read all commands. It imports them all, which takes seconds."""
    return tuple(_read(command.name) for command in COMMANDS)


def _read(name: str) -> CommandFacts:
    command = next(command for command in COMMANDS if command.name == name)
    parser = parser_of(command)
    groups = ((group.title or "", tuple(_options(group))) for group in parser._action_groups)
    return CommandFacts(
        name=name,
        group=command.group,
        summary=command.summary,
        description=parser.description or "",
        usage=" ".join(parser.format_usage().removeprefix("usage: ").split()),
        groups=tuple((title, options) for title, options in groups if options),
        examples=examples_of(command),
    )


def _options(group: argparse._ArgumentGroup) -> Iterator[OptionFacts]:
    for action in group._group_actions:
        if action.help is argparse.SUPPRESS:
            continue
        choices = tuple(map(str, action.choices or ()))
        metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        yield OptionFacts(
            flags=tuple(action.option_strings),
            metavar="" if action.nargs == 0 else "|".join(choices) or metavar,
            summary=(action.help or "").replace("%%", "%"),
            choices=choices,
            is_required=action.required,
        )
