"""Print a script that completes commands, options and their values in a shell; it runs no Python when a key is hit.

    bash   autodist-fx completion bash > ~/.local/share/bash-completion/completions/autodist-fx
    zsh    autodist-fx completion zsh > "${fpath[1]}/_autodist-fx"
    fish   autodist-fx completion fish > ~/.config/fish/completions/autodist-fx.fish
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterable, Sequence

from autodist_fx.cli.parser import PROGRAM
from autodist_fx.cli.reference.facts import CommandFacts, OptionFacts, read_commands

EXAMPLES = (('eval "$(autodist-fx completion bash)"', "for this shell alone"),)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `autodist-fx completion`."""
    parser.add_argument("shell", choices=tuple(_WRITERS), help="the shell that reads the script")


def run(args: argparse.Namespace) -> int:
    """Print the script; return the exit code."""
    print(_WRITERS[args.shell](read_commands()))
    return 0


def bash(commands: Sequence[CommandFacts]) -> str:
    """Write the script for bash: after an option its values or paths, else the command's options."""
    return "\n".join(
        [
            f"# bash completion of {PROGRAM}, written by `{PROGRAM} completion bash`",
            "_autodist_fx() {",
            '    local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} command= word',
            '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
            "        if [[ $word != -* ]]; then command=$word; break; fi",
            "    done",
            "    COMPREPLY=()",
            '    case "$command $before" in',
            *(line for command in commands for line in _bash_values(command)),
            "    esac",
            "    case $command in",
            _bash_words("''", [*(command.name for command in commands), "--help", "--version"]),
            *(_bash_command(command) for command in commands),
            "    esac",
            "}",
            f"complete -F _autodist_fx {PROGRAM}",
        ]
    )


def _bash_values(command: CommandFacts) -> Iterable[str]:
    for option in command.options:
        pattern = "|".join(f"'{command.name} {flag}'" for flag in option.flags)
        if option.flags and option.choices:
            yield _bash_words(pattern, option.choices)
        elif option.flags and option.metavar:
            yield f"        {pattern}) {_BASH_PATHS if option.takes_path else ''}return ;;"


def _bash_command(command: CommandFacts) -> str:
    flags = [flag for option in command.options for flag in option.flags]
    values = [option for option in command.options if not option.flags]
    if any(option.takes_path for option in values):
        line = f'if [[ $current == -* ]]; then {_bash_reply(flags)}; else {_BASH_PATHS}fi'
        return f"        {command.name}) {line} ;;"
    return _bash_words(command.name, [*flags, *(choice for option in values for choice in option.choices)])


def _bash_words(pattern: str, words: Iterable[str]) -> str:
    return f"        {pattern}) {_bash_reply(words)}; return ;;"


def _bash_reply(words: Iterable[str]) -> str:
    return f'COMPREPLY=($(compgen -W "{" ".join(words)}" -- "$current"))'


_BASH_PATHS = 'compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -f -- "$current")); '


def zsh(commands: Sequence[CommandFacts]) -> str:
    """Write the script for zsh, by its own _arguments."""
    names = " ".join(shlex.quote(f"{command.name}:{command.summary}") for command in commands)
    cases = []
    for command in commands:
        specs = [spec for option in command.options for spec in _zsh_option(option)]
        words = [f"        {command.name}) _arguments", *map(shlex.quote, specs)]
        cases.append(" \\\n            ".join(words) + " ;;")
    return "\n".join(
        [
            f"#compdef {PROGRAM}",
            f"# written by `{PROGRAM} completion zsh`",
            "_autodist_fx() {",
            f"    local -a commands=({names})",
            "    if (( CURRENT == 2 )); then _describe command commands; return; fi",
            "    shift words; (( CURRENT-- ))",
            "    case $words[1] in",
            *cases,
            "    esac",
            "}",
            f'if [ "$funcstack[1]" = _{PROGRAM} ]; then _autodist_fx "$@"; else compdef _autodist_fx {PROGRAM}; fi',
        ]
    )


def _zsh_option(option: OptionFacts) -> Iterable[str]:
    summary = re.sub(r"[][:\\]", r"\\\g<0>", option.summary)
    values = f"({' '.join(option.choices)})" if option.choices else "_files" if option.takes_path else " "
    name = option.metavar.replace(":", "\\:")
    if not option.flags:
        yield f":{summary}:{values}"
    for flag in option.flags:
        yield f"{flag}[{summary}]" + (f":{name}:{values}" if option.metavar else "")


def fish(commands: Sequence[CommandFacts]) -> str:
    """Write the script for fish: a line for each command and each option."""
    lines = [f"# written by `{PROGRAM} completion fish`", f"complete -c {PROGRAM} -f"]
    for command in commands:
        summary = shlex.quote(command.summary)
        lines.append(f"complete -c {PROGRAM} -n __fish_use_subcommand -a {command.name} -d {summary}")
        lines += [_fish_option(command.name, option) for option in command.options]
    return "\n".join(lines)


def _fish_option(command: str, option: OptionFacts) -> str:
    words = [f"complete -c {PROGRAM} -n '__fish_seen_subcommand_from {command}'"]
    words += [f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.flags]
    if option.choices:
        words.append(f"{'-x ' if option.flags else ''}-a {shlex.quote(' '.join(option.choices))}")
    elif option.takes_path:
        words.append("-r -F" if option.flags else "-F")
    elif option.metavar:
        words.append("-x")
    return " ".join([*words, f"-d {shlex.quote(option.summary)}"])


_WRITERS = {"bash": bash, "zsh": zsh, "fish": fish}
