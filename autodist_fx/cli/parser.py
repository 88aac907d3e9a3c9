"""Builds the command line's parser: each command's options in groups, examples, and what the exit codes mean."""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Sequence
from typing import Any, NoReturn

from autodist_fx.cli.commands import COMMANDS, GROUPS, Command
from autodist_fx.own_version import own_version

PROGRAM = "autodist-fx"
DESCRIPTION = "Splits an unmodified Hugging Face model over tensor- and pipeline-parallel ranks."
SUCCESS, DIFFERENT, USER_ERROR, LOST_ANOTHER_RANK, INTERRUPTED = 0, 1, 2, 70, 130
EXIT_CODES = (
    (str(SUCCESS), "done"),
    (str(DIFFERENT), "diff found differences, doctor something missing, course something wrong; or a traceback: a bug"),
    (str(USER_ERROR), "an error that the user can mend, said in one line"),
    (str(LOST_ANOTHER_RANK), "this rank lost another one, which says why"),
    ("128+N", "a rank was killed by signal N"),
    (str(INTERRUPTED), "ended by Ctrl-C"),
)


class Parser(argparse.ArgumentParser):
    """An argument parser, also for subcommands, that reports a mistake in one line without the usage."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter, **keywords})

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: error: {message}\n")


class HelpFormatter(argparse.HelpFormatter):
    """Fills each paragraph to the terminal's width, but for those with indented lines, which stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled = []
        for paragraph in text.strip("\n").split("\n\n"):
            lines = paragraph.splitlines()
            is_table = any(line.startswith(" ") for line in lines)
            filled.append("\n".join(lines) if is_table else super()._fill_text(paragraph, width, indent))
        return "\n\n".join(filled)


def parser_for(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Build the parser for a command line. It imports the called command only: torch and transformers take seconds,
    and --help needs neither."""
    called = next((a for a in arguments if not a.startswith("-")), None)
    codes = "\n".join(f"  {code:<6} {meaning}" for code, meaning in EXIT_CODES)
    parser = Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [-h] [--version] COMMAND ...",
        description="\n\n".join([DESCRIPTION, *map(_listed, GROUPS)]),
        epilog=f"`{PROGRAM} COMMAND --help` shows a command's options, with examples.\n\nexit codes:\n{codes}",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {own_version()}")
    commands = parser.add_subparsers(
        prog=PROGRAM, dest="command", required=True, metavar="COMMAND", help=argparse.SUPPRESS
    )
    for command in COMMANDS:
        added = commands.add_parser(command.name)
        if command.name == called:
            fill(added, command)
    return parser


def parser_of(command: Command) -> argparse.ArgumentParser:
    """Build one command's own parser, as `autodist-fx COMMAND` has it."""
    parser = Parser(prog=f"{PROGRAM} {command.name}")
    fill(parser, command)
    return parser


def examples_of(command: Command) -> tuple[tuple[str, str], ...]:
    """Return a command's examples: (command line, what it does)."""
    found: tuple[tuple[str, str], ...] = importlib.import_module(command.module).EXAMPLES
    return found


def fill(parser: argparse.ArgumentParser, command: Command) -> None:
    """Add a command's options, the texts around them in --help, and the function that runs it."""
    module = importlib.import_module(command.module)
    lines = "\n".join(f"  {line}\n      {meaning}" for line, meaning in examples_of(command))
    parser.description = inspect.cleandoc(module.__doc__ or command.summary)
    parser.epilog = f"examples:\n{lines}"
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)
    parser.usage = _usage(parser)


def _usage(parser: argparse.ArgumentParser) -> str:
    """Name what must be given alone: forty options in a usage line help nobody."""
    given = [action for action in parser._actions if action.required]
    words = [" ".join([*action.option_strings[:1], str(action.metavar or action.dest)]) for action in given]
    return " ".join([parser.prog, *words, "[options]"])


def _listed(group: str) -> str:
    """List the commands of a group, as --help shows them."""
    lines = [f"  {command.name:<11} {command.summary}" for command in COMMANDS if command.group == group]
    return "\n".join([f"{group}:", *lines])
