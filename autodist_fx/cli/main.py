"""`autodist-fx`: parses the command line and runs a subcommand; an error becomes one line and exit code 2.

Notes on an error (the lines of a graph around a node that verify refuses) are printed under it, indented.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from autodist_fx.cli.parser import INTERRUPTED, LOST_ANOTHER_RANK, SUCCESS, USER_ERROR, parser_for
from autodist_fx.errors import AutodistError

_RUNTIME = "autodist_fx.runtime.comm.process_group"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    parser.EXIT_CODES says what each means.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # torch's C++ code would log our errors a second time, with its stack. torch reads this variable when imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    args = parser_for(arguments).parse_args(arguments)
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
        return SUCCESS
    except KeyboardInterrupt:
        _leave("ended by Ctrl-C")  # else the other ranks notice only when their next wait fails
        return INTERRUPTED


def main_of_fork(argv: Sequence[str]) -> int:
    """Run one command as a rank that was forked, and return its exit code; see launch_local."""
    code = main(argv)
    _leave(None)  # a new process does so at its exit
    return code


def _leave(failure: str | None, *, is_said: bool = False) -> None:
    """Leave the other ranks; with `failure`, which tells them why, they end,
    too. Does nothing where the runtime was never imported."""
    runtime = sys.modules.get(_RUNTIME)
    if runtime is not None:
        runtime.leave(failure, is_said=is_said)


def _is_said_elsewhere(error: AutodistError) -> bool:
    """Return whether another of the ranks that this command started says the error."""
    runtime = sys.modules.get(_RUNTIME)
    return runtime is not None and bool(runtime.is_said_elsewhere(error))


if __name__ == "__main__":
    sys.exit(main())
