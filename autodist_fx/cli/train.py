"""Fine-tune a model that is split over tp * pp ranks and dp replicas, on texts, one a line of a JSON-lines file.

Starts the ranks itself, on this machine. Under torchrun it is one of them instead. The run is saved in --out as it
goes, and --resume goes on with it, on any mesh; at the end --out has the model as transformers reads it.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.optim import AdamW, Optimizer

from autodist_fx.api.train import train
from autodist_fx.cli.arguments import (
    above_zero,
    add_model_arguments,
    at_least,
    be_quiet,
    checkpoint_source,
    plan_keywords,
)
from autodist_fx.cli.start_ranks import compute_alone, start_ranks
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.join_options import DEFAULT_TIMEOUT_SECONDS
from autodist_fx.runtime.comm.process_group import started_by_torchrun
from autodist_fx.runtime.device.choice import choose_device
from autodist_fx.runtime.training.autograd.recompute import RECOMPUTE
from autodist_fx.runtime.training.schedules import SCHEDULES
from autodist_fx.training.engine import Engine
from autodist_fx.training.text_batches import TextBatches, read_rows
from autodist_fx.weights.checkpoint import load_tokenizer
from autodist_fx.weights.resolve import is_on_hub, resolve
from cost_model.format import bytes_text, seconds_text

EXAMPLES = (
    ("autodist-fx train --model smollm2 --data texts.jsonl --tp 2 --out tuned", "two ranks of this machine"),
    ("autodist-fx train --model smollm2 --data texts.jsonl --pp 2 --out tuned --resume", "go on, on another mesh"),
    ("autodist-fx train --model DIR --data texts.jsonl --tp 2 --dp 2 --zero-stage 1 --out tuned", "two replicas"),
    ("autodist-fx train --model DIR --data texts.jsonl --tp 2 --out tuned --dry-run", "what would be started and read"),
)
_RUN, _LOG = "run", "log.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `autodist-fx train`."""
    add_model_arguments(parser)
    mesh = parser.add_argument_group("the mesh in training")
    mesh.add_argument("--dp", type=at_least(1), default=1, metavar="D", help="replicas, with rows of their own (1)")
    mesh.add_argument("--schedule", choices=tuple(SCHEDULES), default="1f1b", help="of the pipeline's passes (1f1b)")
    mesh.add_argument("--microbatches", type=at_least(1), metavar="N", help="parts of a replica's rows (pp)")
    mesh.add_argument("--zero-stage", type=int, choices=(0, 1), default=0, help="1: optimizer states once over dp (0)")
    mesh.add_argument("--recompute", choices=tuple(RECOMPUTE), default="none", help="layers: less memory (none)")
    data = parser.add_argument_group("the data")
    data.add_argument("--data", required=True, metavar="FILE.jsonl", help='lines of {"text"}, {"prompt", "completion"} '
                      'or {"messages"}')  # fmt: skip
    data.add_argument("--batch-size", type=at_least(1), default=8, metavar="N", help="texts a step, over all dp (8)")
    data.add_argument("--max-length", type=at_least(2), default=512, metavar="N", help="tokens of a text (512)")
    data.add_argument("--epochs", type=at_least(1), default=1, metavar="N", help="times through the data (1)")
    data.add_argument("--steps", type=at_least(1), metavar="N", help="so many steps, and not --epochs")
    steps = parser.add_argument_group("the steps")
    steps.add_argument("--learning-rate", type=above_zero, default=5e-5, metavar="X", help="of AdamW (5e-5)")
    steps.add_argument("--lr-scheduler", default="linear", metavar="NAME", help="as transformers names it (linear)")
    steps.add_argument("--warmup-steps", type=at_least(0), default=0, metavar="N", help="until the full rate (0)")
    steps.add_argument("--weight-decay", type=float, default=0.0, metavar="X", help="of matrices (0)")
    steps.add_argument("--max-grad-norm", type=float, default=1.0, metavar="X", help="clip to it; 0: do not (1.0)")
    steps.add_argument("--seed", type=at_least(0), default=0, help="of dropout and of the order of texts (0)")
    out = parser.add_argument_group("what comes of it")
    out.add_argument("--out", required=True, metavar="DIR", help="the model, the run and a log of its steps")
    out.add_argument("--save-steps", type=at_least(1), default=100, metavar="N", help="save the run so often (100)")
    out.add_argument("--resume", action="store_true", help="go on with the run that is in --out")
    ranks = parser.add_argument_group("the ranks")
    ranks.add_argument("--device", help="cpu, or cuda (the default where it is)")
    ranks.add_argument("--timeout", type=above_zero, default=DEFAULT_TIMEOUT_SECONDS, metavar="S",
                       help="seconds to wait for a rank (600)")  # fmt: skip
    ranks.add_argument("--no-verify", action="store_true", help="do not prove the ranks' programs first")
    ranks.add_argument("--dry-run", action="store_true", help="print the plan, and what would be started; no ranks")


def run(args: argparse.Namespace) -> int:
    """Train, in this process or in ranks that it starts, and return the exit code."""
    be_quiet()
    out, size = Path(args.out), (args.tp or 1) * (args.pp or 1) * args.dp
    has_run = (out / _RUN).is_dir()
    if args.resume and not has_run:
        raise AutodistError(f"there is no run in {out}: leave --resume out")
    if not args.resume and has_run:
        raise AutodistError(f"{out} holds a run already: go on with it by --resume, or choose another --out")
    try:
        transformers.SchedulerType(args.lr_scheduler)
    except ValueError as error:
        raise AutodistError(f"--lr-scheduler: {error}") from None
    if args.dry_run:
        from autodist_fx.cli.dry_run.train import print_dry_run  # plans, which a run does later and otherwise

        if is_on_hub(checkpoint_source(args)):
            raise AutodistError(f"--dry-run counts tokens, and {args.model} is not on this machine: download it first")
        print_dry_run(args, read_texts(args)[0])
        return 0
    if size > 1 and not started_by_torchrun():
        device = choose_device(args.device, size - 1)  # these two so that an error is printed once
        compute_alone()
        read_texts(args)
        return start_ranks(args.argv, size, device)
    _train(args, out)
    return 0


def read_texts(args: argparse.Namespace) -> tuple[TextBatches, transformers.PreTrainedTokenizerBase]:
    """Return the batches of --data, and the tokenizer of --model."""
    tokenizer = load_tokenizer(resolve(checkpoint_source(args)))
    rows = read_rows(Path(args.data), tokenizer, args.max_length)
    pad = tokenizer.pad_token_id
    return TextBatches(rows, args.batch_size, args.seed, 0 if pad is None else pad), tokenizer


def adamw(parameters: list[tuple[str, nn.Parameter]], learning_rate: float, weight_decay: float) -> Optimizer:
    """Return AdamW that decays matrices alone, in the same two groups for any parameters."""
    groups = [
        {"params": [p for _, p in parameters if (p.dim() > 1) == is_matrix], "weight_decay": decay}
        for is_matrix, decay in ((True, weight_decay), (False, 0.0))
    ]
    return AdamW(groups, lr=learning_rate, fused=True)


@dataclass(frozen=True, slots=True)
class StepLine:
    """A step as the log has it."""

    step: int
    loss: float
    grad_norm: float
    tokens: int
    seconds: float


def _train(args: argparse.Namespace, out: Path) -> None:
    batches, tokenizer = read_texts(args)
    steps = args.steps or args.epochs * batches.steps_an_epoch
    engine = _engine(args, steps)
    is_first, facts = 0 in engine.ranks, batches.facts()
    begin = _resumed(engine, out, facts) if args.resume else 0
    if begin >= steps:
        raise AutodistError(f"the run in {out} has taken {begin} steps of {steps}: raise --epochs or --steps")
    if is_first:
        out.mkdir(parents=True, exist_ok=True)
    taken: list[float] = []
    with _shown(steps, begin, is_first) as show:
        for step in range(begin, steps):
            batch, started = batches.batch(step), time.perf_counter()
            result = engine.step(batch)
            seconds = time.perf_counter() - started
            line = StepLine(result.step, result.loss, result.grad_norm, int(batch["attention_mask"].sum()), seconds)
            show(line)
            taken.append(seconds)
            if is_first:
                with (out / _LOG).open("a", encoding="utf-8") as log:
                    log.write(json.dumps(asdict(line)) + "\n")
            if result.step % args.save_steps == 0 and result.step < steps:
                engine.save(out / _RUN, data=facts, background=True)
    engine.save(out / _RUN, data=facts)
    engine.save_pretrained(out)
    if is_first:
        tokenizer.save_pretrained(out)
        # The first step compiles; batches are padded to their own longest text, so one of them stands for all.
        measured, predicted = statistics.median(taken[1:] or taken), engine.estimate(batches.batch(begin))
        print(
            f"{steps} steps; a step took {seconds_text(measured)}, and was predicted to take "
            f"{seconds_text(predicted.seconds)} and {bytes_text(predicted.memory_bytes)} a rank; the model is in {out}",
            flush=True,
        )


def _engine(args: argparse.Namespace, steps: int) -> Engine:
    return train(
        checkpoint_source(args),
        dp=args.dp, schedule=args.schedule, microbatches=args.microbatches, zero_stage=args.zero_stage,
        recompute=args.recompute, seed=args.seed, dtype=args.dtype, device=args.device, timeout=args.timeout,
        verify=not args.no_verify, max_grad_norm=args.max_grad_norm if args.max_grad_norm > 0 else None,
        optimizer=functools.partial(adamw, learning_rate=args.learning_rate, weight_decay=args.weight_decay),
        lr_scheduler=functools.partial(
            transformers.get_scheduler, args.lr_scheduler, num_warmup_steps=args.warmup_steps, num_training_steps=steps
        ),
        **{**plan_keywords(args), "tp": args.tp or 1, "pp": args.pp or 1, "objective": args.objective or "shard"},
    )  # fmt: skip


def _resumed(engine: Engine, out: Path, facts: dict[str, object]) -> int:
    """Load the run in `out`; return how many steps it has taken. Raises AutodistError for other batches."""
    resumed = engine.load(out / _RUN)
    for name, value in facts.items():
        if resumed.data.get(name) != value:
            raise AutodistError(
                f"{name} of the run in {out}: {resumed.data.get(name)}, and now {value}: go on with the same --data, "
                "--max-length, --batch-size and --seed"
            )
    return resumed.step


@contextmanager
def _shown(steps: int, begin: int, is_first: bool) -> Iterator[Callable[[StepLine], None]]:
    """Yield a function that shows a step: as a bar in a terminal, else as a line."""
    console = Console(stderr=True)
    if not is_first:
        yield lambda line: None
        return
    if not console.is_terminal:
        yield lambda line: print(f"step {line.step}/{steps}: {_numbers(line)}", flush=True)
        return
    columns = TextColumn("[bold]step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[numbers]}")
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=steps, completed=begin, numbers="")
        yield lambda line: progress.update(task, completed=line.step, numbers=_numbers(line))


def _numbers(line: StepLine) -> str:
    rate = line.tokens / line.seconds
    return f"loss {line.loss:.4f}, gradient {line.grad_norm:.3g}, {rate:,.0f} tokens/s"
