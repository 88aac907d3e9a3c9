"""Lists the commands of `autodist-fx`: the group under which --help shows each, and the module that runs it."""

from __future__ import annotations

from dataclasses import dataclass

GENERATE, PLAN, CHECK, LEARN, MACHINE = "generate and train", "plans", "proof", "learn", "this machine"
GROUPS = (GENERATE, PLAN, CHECK, LEARN, MACHINE)


@dataclass(frozen=True, slots=True)
class Command:
    """A command: its name, the group it is shown in, and what it does in one line.

    `folder`: of its module, under autodist_fx/cli. The module has `add_arguments(parser)`, `run(args)`, which returns
    the exit code, a docstring, which --help begins with, and EXAMPLES: pairs of a command line and what it does.
    """

    name: str
    group: str
    summary: str
    folder: str = ""

    @property
    def module(self) -> str:
        """Return the module's dotted name."""
        return ".".join(part for part in ("autodist_fx.cli", self.folder, self.name.replace("-", "_")) if part)


COMMANDS = (
    Command("run", GENERATE, "generate text, split over ranks"),
    Command("train", GENERATE, "fine-tune on texts, split over ranks"),
    Command("compile", GENERATE, "write a split to disk: plan, graphs and weights of all ranks"),
    Command("plan", PLAN, "print how a model would be split, from its config alone", "plans"),
    Command("show", PLAN, "a saved plan as tables, as an HTML page, or for Graphviz", "plans"),
    Command("explain", PLAN, "why a saved plan is as it is, and what else would cost", "plans"),
    Command("diff", PLAN, "what differs between two saved plans; exit code 1 if they differ", "plans"),
    Command("verify", CHECK, "prove every rank's program of a split"),
    Command("graph-diff", CHECK, "what the passes changed in one rank's graph"),
    Command("course", LEARN, "lessons in which you write what the compiler does, and have it graded", "course"),
    Command("doctor", MACHINE, "versions, devices, transports, and what is missing", "machine"),
    Command("measure", MACHINE, "measure this machine, so that plans are predicted for what it is", "machine"),
    Command("profile", MACHINE, "what a split spends here, by op, beside what its plan predicts", "machine"),
    Command("completion", MACHINE, "a script that completes commands and options in bash, zsh or fish", "reference"),
    Command("manual", MACHINE, "the manual of all commands, as a man page or as Markdown", "reference"),
)
