"""Print the manual of all commands, as a man page or as Markdown, made of the parser that --help is made of.

    autodist-fx manual > ~/.local/share/man/man1/autodist-fx.1
"""

from __future__ import annotations

import argparse

from autodist_fx.cli.reference.facts import read_commands
from autodist_fx.cli.reference.man_page import man_page
from autodist_fx.cli.reference.markdown import markdown

EXAMPLES = (
    ("autodist-fx manual | man -l -", "read it now"),
    ("autodist-fx manual --format markdown", "the page of the site"),
)
_WRITERS = {"man": man_page, "markdown": markdown}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `autodist-fx manual`."""
    parser.add_argument("--format", choices=tuple(_WRITERS), default="man", help="what is written (man)")


def run(args: argparse.Namespace) -> int:
    """Print the manual; return the exit code."""
    print(_WRITERS[args.format](read_commands()), end="")
    return 0
