"""Generate text with a model that is split over tp * pp ranks.

Starts the ranks itself, on this machine. Under torchrun it is one of them instead. With --rank, --world-size,
--master-addr and --master-port it runs that one rank in this terminal, where breakpoint() works.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional as F

from autodist_fx.api.artifact import Artifact
from autodist_fx.cli.arguments import (
    above_zero,
    add_model_arguments,
    at_least,
    be_quiet,
    probability,
)
from autodist_fx.cli.generation.command_start import VARIABLE, command_started, process_started
from autodist_fx.cli.generation.forecast import forecast_text
from autodist_fx.cli.generation.prompts import Answer, TimedStreamer, encode, split_answers
from autodist_fx.cli.generation.sources import FromCheckpoint, Saved, Source
from autodist_fx.cli.start_ranks import compute_alone, start_ranks
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.agreement import agree, digest, over
from autodist_fx.runtime.comm.process_group import started_by_torchrun
from autodist_fx.runtime.device.choice import choose_device
from autodist_fx.runtime.microbatches.count import Microbatches, checked
from cost_model.mesh import Mesh

EXAMPLES = (
    ('autodist-fx run --model smollm2 --tp 2 --prompt "What is the capital of France?"', "two ranks of this machine"),
    ("autodist-fx run --model DIR --tp 2 --pp 2 --batch-file prompts.txt --json", "one prompt a line, answers as JSON"),
    ("autodist-fx run --model DIR --tp 2 --prompt Hello --dry-run", "what would be started and read; no ranks"),
    ("torchrun --nproc-per-node 2 -m autodist_fx.cli.main run --model DIR --tp 2 --prompt Hello", "ranks of torchrun"),
)

_BATCH = 32  # prompts of a batch, of which the command keeps some in flight

# Options of transformers' GenerationConfig, by their own names.
_SAMPLING: tuple[tuple[str, Any, str], ...] = (
    ("temperature", above_zero, "softens (> 1) or sharpens (< 1) the distribution that is sampled"),
    ("top_k", at_least(0), "sample among the k likeliest tokens"),
    ("top_p", probability, "sample among the likeliest tokens that make up this probability"),
    ("min_p", probability, "sample among tokens of at least this share of the likeliest one's probability"),
    ("typical_p", probability, "locally typical sampling"),
    ("repetition_penalty", above_zero, "above 1: less repetition"),
    ("no_repeat_ngram_size", at_least(0), "no n tokens in a row occur twice"),
    ("num_beams", at_least(1), "beam search"),
    ("min_new_tokens", at_least(0), "no end before so many tokens"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `autodist-fx run`."""
    add_model_arguments(parser, required=False)
    saved = parser.add_argument_group("splits on disk")
    saved.add_argument("--artifact", metavar="DIR", help="run what `autodist-fx compile --out DIR` wrote; no --model")
    saved.add_argument("--no-cache", action="store_true", help="neither use nor keep a split of --model (ADX_CACHE)")
    # The process that starts the ranks passes these two to all of them.
    saved.add_argument("--cache-entry", help=argparse.SUPPRESS)
    saved.add_argument("--planned", help=argparse.SUPPRESS)
    text = parser.add_argument_group("the text")
    text.add_argument("--prompt", metavar="TEXT", help="one prompt; its answer is streamed")
    text.add_argument("--batch-file", metavar="FILE", help="one prompt a line, answered together")
    text.add_argument(
        "--max-new-tokens", type=at_least(1), default=128, metavar="K", help="tokens to generate per prompt (128)"
    )
    text.add_argument(
        "--microbatches", type=_microbatches, default="auto", metavar="N",
        help="with --pp, groups of prompts that go round the stages; auto (the default): as the plan's costs say",
    )  # fmt: skip
    text.add_argument("--no-chat-template", action="store_true", help="continue the prompt as it stands")
    text.add_argument("--json", action="store_true", help="print one JSON object: texts, token ids, timings")
    sampling = parser.add_argument_group("sampling, as in transformers; what is not given is the checkpoint's default")
    sampling.add_argument("--do-sample", action=argparse.BooleanOptionalAction, help="sample, or be greedy")
    for name, kind, summary in _SAMPLING:
        sampling.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=summary)
    sampling.add_argument("--seed", type=at_least(0, 2**32 - 1), help="seed of the random numbers")
    ranks = parser.add_argument_group("the ranks")
    ranks.add_argument("--device", type=_device, help="cpu, or cuda (the default where it is); cuda:N with --rank")
    ranks.add_argument(
        "--timeout", type=above_zero, metavar="S", help="seconds to wait for a rank (600; with --rank a day)"
    )
    ranks.add_argument(
        "--cuda-graphs", action="store_true", help="capture the steps of decoding once, and replay them (CUDA)"
    )
    ranks.add_argument("--dump-dir", metavar="DIR", help="each rank's graph after each pass, as text")
    ranks.add_argument("--no-verify", action="store_true", help="do not prove the ranks' programs first")
    ranks.add_argument("--dry-run", action="store_true", help="print the plan, and what would be started; no ranks")
    ranks.add_argument("--rank", type=at_least(0), metavar="R", help="run this rank only, here")
    ranks.add_argument("--world-size", type=at_least(1), metavar="W", help="ranks in all, with --rank")
    ranks.add_argument("--master-addr", metavar="A", help="address of rank 0, with --rank")
    ranks.add_argument("--master-port", type=at_least(1, 65535), metavar="P", help="a free port there, with --rank")


def _microbatches(text: str) -> Microbatches:
    try:
        return checked(text if text == "auto" else int(text))
    except (ValueError, AutodistError):
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number of 1 and more") from None


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda nor cuda:N")
    return text


def run(args: argparse.Namespace) -> int:
    """Generate, in this process or in ranks that it starts, and return the exit code."""
    be_quiet()
    prompts = _prompts(args)
    if args.rank is None and (args.world_size, args.master_addr, args.master_port) != (None, None, None):
        raise AutodistError("--world-size, --master-addr and --master-port say where --rank R belongs: add --rank")
    source: Source = Saved(args, Artifact(args.artifact)) if args.artifact else FromCheckpoint(args)
    if args.dry_run:
        from autodist_fx.cli.dry_run.generate import print_dry_run  # a rank does without what it imports

        print_dry_run(args, prompts, source)
        return 0
    if args.rank is None and not started_by_torchrun() and source.mesh.size > 1:
        return _start_ranks(args, prompts, source)
    _generate(args, prompts, source)
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    """Read the prompts from --prompt or --batch-file. Raises AutodistError where there are none."""
    if (args.prompt is None) == (args.batch_file is None):
        raise AutodistError("give either --prompt TEXT or --batch-file FILE (one prompt a line)")
    if args.batch_file is None:
        return [args.prompt]
    try:
        lines = Path(args.batch_file).read_text(encoding="utf-8-sig").split("\n")  # not at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise AutodistError(f"cannot read --batch-file {args.batch_file}: {error}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise AutodistError(f"--batch-file {args.batch_file} holds no prompt: write one a line")
    return prompts


def _start_ranks(args: argparse.Namespace, prompts: list[str], source: Source) -> int:
    """Start all ranks as processes on this machine, and return the exit code."""
    if args.device and ":" in args.device:
        raise AutodistError(f"--device {args.device} is one rank's: add --rank, or say cuda: a device for each")
    device = choose_device(args.device, source.mesh.size - 1)
    compute_alone()
    encode(source.tokenizer(), prompts, chat=not args.no_chat_template)
    with tempfile.TemporaryFile() as scratch:  # it has no name, so nothing is left however this process ends
        further = source.for_ranks(Path(f"/dev/fd/{scratch.fileno()}"))
        started = {VARIABLE: str(command_started())}
        return start_ranks([*args.argv, *further], source.mesh.size, device, started, keep_open=(scratch.fileno(),))


def _generate(args: argparse.Namespace, prompts: list[str], source: Source) -> None:
    """Generate as one rank, and print the answers where this rank is the one that prints."""
    spent = {"imports": time.monotonic() - process_started()}
    if os.environ.get(VARIABLE):
        spent = {"the launcher": process_started() - command_started(), **spent}
    # Encode before loading: the error for a bad prompt should not wait for the weights.
    tokenizer = source.tokenizer()
    inputs = encode(tokenizer, prompts, chat=not args.no_chat_template)
    mesh, model = source.mesh, source.share(tokenizer)
    ready_seconds, report = time.monotonic() - command_started(), model.load_report
    spent |= {**report.start_seconds, "weights": report.seconds}
    spent["meeting and the rest"] = ready_seconds - sum(spent.values())
    options = {"max_new_tokens": args.max_new_tokens, **_options(args, model.generation_config, tokenizer)}
    if mesh.size > 1:  # the leader alone runs generate, so all ranks must have been asked the same
        asked = json.dumps([prompts, options, args.seed, args.no_chat_template])
        agree(over(model.communicator, model.rank, mesh.size), model.rank, {"the request": digest(asked)})
    speaks = model.rank == 0 or args.rank is not None
    one_beam = (args.num_beams or model.generation_config.num_beams or 1) == 1
    streams = speaks and not args.json and len(prompts) == 1 and one_beam
    text = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
    in_groups = mesh.pp > 1 and len(prompts) > 1 and args.microbatches != 1  # steps have no time of their own then
    streamer = TimedStreamer(text) if one_beam and not in_groups else None
    model.microbatches = args.microbatches
    if args.seed is not None:
        transformers.set_seed(args.seed)
    start = time.perf_counter()
    try:
        rows = {name: value.to(model.device) for name, value in inputs.items()}
        if in_groups and len(prompts) > 2 * _BATCH and not options.get("do_sample"):
            output = _in_batches(model, rows, options)
        else:
            output = model.generate(**rows, streamer=streamer, **options)
    except AutodistError:
        raise
    except Exception as error:  # from generate's own checks, or from the model's code with a note that names the node
        notes = getattr(error, "__notes__", [])
        if not notes and not isinstance(error, ValueError):
            raise
        raise AutodistError("; ".join([f"{type(error).__name__}: {error}", *notes])) from error
    seconds = time.perf_counter() - start
    if not speaks:
        return
    eos = model.generation_config.eos_token_id
    ends = [eos] if isinstance(eos, int) else eos or []
    is_decoder_only = not model.config.is_encoder_decoder
    answers = split_answers(tokenizer, prompts, inputs, output.cpu(), ends, after_prompt=is_decoder_only)
    timings = _timings(ready_seconds, seconds, answers, streamer, start)
    if args.json:
        print(json.dumps({**_as_dict(args, mesh, model, answers, timings), "start": spent}, ensure_ascii=False))
    else:
        _print(answers, timings, spent, mesh, forecast_text(model.plan, len(prompts)), streamed=streams)


def _in_batches(model: Any, rows: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> torch.Tensor:
    """Generate for many prompts, int64 [prompts, tokens], some of them at a time: a batch that ends makes room."""
    count = len(rows["input_ids"])
    batches = [{name: x[at : at + _BATCH] for name, x in rows.items()} for at in range(0, count, _BATCH)]
    found = model.generate_many(batches, **options)
    width = max(sequences.shape[1] for sequences in found)
    return torch.cat([F.pad(x, (0, width - x.shape[1]), value=options.get("pad_token_id") or 0) for x in found])


def _options(args: argparse.Namespace, defaults: transformers.GenerationConfig, tokenizer: Any) -> dict[str, Any]:
    """Collect the keyword arguments of generate() besides the prompt."""
    options = {name: getattr(args, name) for name, *_ in _SAMPLING if getattr(args, name) is not None}
    if args.do_sample is not None:
        options["do_sample"] = args.do_sample
    elif {"temperature", "top_k", "top_p", "min_p", "typical_p"} & options.keys():
        options["do_sample"] = True  # greedy search would ignore the options given
    if defaults.pad_token_id is None:
        options["pad_token_id"] = tokenizer.pad_token_id
    return options


def _timings(
    ready_seconds: float, seconds: float, answers: list[Answer], streamer: TimedStreamer | None, start: float
) -> dict[str, float | int | None]:
    """Return the seconds and rates to report."""
    tokens = sum(len(answer.token_ids) for answer in answers)
    stamps = streamer.token_stamps if streamer is not None else []
    steps = len(stamps) - 1
    return {
        "ready_seconds": ready_seconds,  # since the command began
        "generate_seconds": seconds,
        "time_to_first_token_seconds": stamps[0] - start if stamps else None,
        "seconds_per_token": (stamps[-1] - stamps[0]) / steps if steps > 0 else None,
        "new_tokens": tokens,
        "tokens_per_second": tokens / seconds,
    }


def _as_dict(
    args: argparse.Namespace, mesh: Mesh, model: Any, answers: list[Answer], timings: dict[str, Any]
) -> dict[str, Any]:
    report = model.load_report
    return {
        "model": args.model or args.artifact,
        "tp": mesh.tp,
        "pp": mesh.pp,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "answers": [answer.as_dict() for answer in answers],
        "timings": timings,
        "load": {"shard_bytes": report.shard_bytes, "bytes_read": report.bytes_read},
    }


def _print(
    answers: list[Answer],
    timings: dict[str, Any],
    spent: Mapping[str, float],
    mesh: Mesh,
    forecast: str,
    *,
    streamed: bool,
) -> None:
    if not streamed:
        for number, answer in enumerate(answers, 1):
            print(f"[{number}] {answer.prompt}\n{answer.text}\n")
    else:
        print()
    first, each = timings["time_to_first_token_seconds"], timings["seconds_per_token"]
    parts = [f"{mesh.size} rank{'s' if mesh.size > 1 else ''} ({mesh})", _ready(timings, spent)]
    if first is not None:
        parts.append(f"first token after {first * 1e3:.0f} ms")
    if each is not None:
        parts.append(f"{each * 1e3:.1f} ms a token{forecast}")
    parts.append(f"{timings['new_tokens']} tokens, {timings['tokens_per_second']:.1f} tokens/s")
    print("; ".join(parts), flush=True)


def _ready(timings: Mapping[str, Any], spent: Mapping[str, float]) -> str:
    """Format "ready in 9.2 s (imports 3.1, trace and plan 2.0, proof 1.0, weights 0.2, meeting and the rest 0.9)"."""
    parts = ", ".join(f"{step} {seconds:.1f}" for step, seconds in spent.items())
    return f"ready in {timings['ready_seconds']:.1f} s ({parts})"
