"""Prints what `autodist-fx run` would do: the plan, the ranks it would start, the files that they would read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from autodist_fx.cli.dry_run.facts import print_facts, refuse_dry_rank, started_text, weights_text
from autodist_fx.cli.generation.prompts import encode
from autodist_fx.cli.generation.sources import FromCheckpoint, Source
from autodist_fx.runtime.device.choice import choose_device
from autodist_fx.weights.resolve import is_on_hub


def print_dry_run(args: argparse.Namespace, prompts: Sequence[str], source: Source) -> None:
    """Print the plan and what the command would start and read. Raises AutodistError where the command would, as far
    as that can be known without weights."""
    refuse_dry_rank(args.rank)
    device = choose_device(args.device, source.mesh.size - 1).type
    plan = source.plan()
    is_remote = isinstance(source, FromCheckpoint) and is_on_hub(source.source)
    tokens = "" if is_remote else _tokens(args, prompts, source)
    asked = f"{len(prompts)} prompt{'s' if len(prompts) > 1 else ''}{tokens}"
    print(plan)
    print_facts(
        ("starts", started_text(source.mesh, device, args.argv)),
        ("reads", source.reads()),
        ("holds", weights_text(plan)),
        ("answers", f"{asked}, {args.max_new_tokens} new at most"),
    )


def _tokens(args: argparse.Namespace, prompts: Sequence[str], source: Source) -> str:
    inputs = encode(source.tokenizer(), prompts, chat=not args.no_chat_template)
    counts = sorted(set(inputs["attention_mask"].sum(-1).tolist()))
    return f" of {counts[0]} tokens" if len(counts) == 1 else f" of {counts[0]} to {counts[-1]} tokens"
