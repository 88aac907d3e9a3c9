"""`autodist-fx`: parses the command line and runs a subcommand; an error becomes one line and exit code 2.

Notes on an error (the lines of a graph around a node that verify refuses) are printed under it, indented.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from autodist_fx.errors import AutodistError

_COMMANDS = {
    "run": "generate text, split over ranks",
    "train": "fine-tune on texts, split over ranks",
    "compile": "write a split to disk: plan, graphs and weights of all ranks",
    "plan": "print how a model would be split, from its config alone",
    "show": "a saved plan as tables, as an HTML page, or for Graphviz",
    "explain": "why a saved plan is as it is, and what else would cost",
    "diff": "what differs between two saved plans; exit code 1 if they differ",
    "verify": "prove every rank's program of a split",
    "graph-diff": "what the passes changed in one rank's graph",
}
USER_ERROR, LOST_ANOTHER_RANK = 2, 70  # 70: as of the watchdog
_RUNTIME = "autodist_fx.runtime.comm.process_group"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 for success, 1 where `diff` finds differences, 2 for an error that the user can mend, 130 for Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # torch's C++ code would log our errors a second time, with its stack. torch reads this variable when imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    args = _parser(arguments).parse_args(arguments)
    args.argv = arguments
    try:
        code: int = args.run(args)
        return code
    except AutodistError as error:
        if _is_said_elsewhere(error):
            return LOST_ANOTHER_RANK
        line = " ".join(str(error).split())
        notes = [f"    {part}" for note in getattr(error, "__notes__", ()) for part in note.splitlines()]
        print("\n".join([f"autodist-fx: error: {line}", *notes]), file=sys.stderr, flush=True)
        _leave(line, is_said=True)
        return USER_ERROR
    except BrokenPipeError:  # `autodist-fx plan ... | head`
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        _leave("ended by Ctrl-C")  # else the other ranks notice only when their next wait fails
        return 130


def _leave(failure: str, *, is_said: bool = False) -> None:
    """Tell the other ranks why this one ends, so that they end,
    too. Does nothing where the runtime was never imported."""
    runtime = sys.modules.get(_RUNTIME)
    if runtime is not None:
        runtime.leave(failure, is_said=is_said)


def _is_said_elsewhere(error: AutodistError) -> bool:
    """Return whether another of the ranks that this command started says the error."""
    runtime = sys.modules.get(_RUNTIME)
    return runtime is not None and bool(runtime.is_said_elsewhere(error))


class _Parser(argparse.ArgumentParser):
    """An argument parser, also for subcommands, that reports a mistake in one line without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: error: {message}\n")


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Build the parser. It imports the called subcommand only: torch
    and transformers take seconds, and --help needs neither."""
    called = next((a for a in arguments if not a.startswith("-")), None)
    parser = _Parser(
        prog="autodist-fx",
        description="Splits an unmodified Hugging Face model over tensor- and pipeline-parallel ranks.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in _COMMANDS.items():
        if name != called:
            commands.add_parser(name, help=summary)
            continue
        module = importlib.import_module(f"autodist_fx.cli.{name.replace('-', '_')}")
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
