"""Generate text with a model that is split over tp * pp ranks.

Starts the ranks itself, on this machine. Under torchrun it is one of them instead. With --rank, --world-size,
--master-addr and --master-port it runs that one rank in this terminal, where breakpoint() works.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import transformers

from autodist_fx.cli.arguments import add_model_arguments, at_least, be_quiet, compile_for, planning_options
from autodist_fx.cli.generation import Answer, TimedStreamer, encode, split_answers
from autodist_fx.errors import AutodistError
from autodist_fx.pretrained import from_pretrained, mesh_of, wanted_dtype
from autodist_fx.runtime.launch import launch_local
from autodist_fx.runtime.process_group import DEFAULT_TIMEOUT_SECONDS, choose_device, started_by_torchrun
from autodist_fx.weights.checkpoint import load_tokenizer
from autodist_fx.weights.resolve import resolve
from cost_model.mesh import Mesh
from cost_model.plan import PartitionPlan

_DAY = 86400.0  # of patience with somebody at a breakpoint

# Options of transformers' GenerationConfig, by their own names.
_SAMPLING: tuple[tuple[str, Any, str], ...] = (
    ("temperature", float, "softens (> 1) or sharpens (< 1) the distribution that is sampled"),
    ("top_k", at_least(0), "sample among the k likeliest tokens"),
    ("top_p", float, "sample among the likeliest tokens that make up this probability"),
    ("min_p", float, "sample among tokens of at least this share of the likeliest one's probability"),
    ("typical_p", float, "locally typical sampling"),
    ("repetition_penalty", float, "above 1: less repetition"),
    ("no_repeat_ngram_size", at_least(0), "no n tokens in a row occur twice"),
    ("num_beams", at_least(1), "beam search"),
    ("min_new_tokens", at_least(0), "no end before so many tokens"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    text = parser.add_argument_group("the text")
    text.add_argument("--prompt", metavar="TEXT", help="one prompt; its answer is streamed")
    text.add_argument("--batch-file", metavar="FILE", help="one prompt a line, answered together")
    text.add_argument("--max-new-tokens", type=at_least(1), default=128, metavar="K", help="per prompt (128)")
    text.add_argument("--no-chat-template", action="store_true", help="continue the prompt as it stands")
    text.add_argument("--json", action="store_true", help="print one JSON object: texts, token ids, timings")
    sampling = parser.add_argument_group("sampling, as in transformers; what is not given is the checkpoint's default")
    sampling.add_argument("--do-sample", action=argparse.BooleanOptionalAction, help="sample, or be greedy")
    for name, kind, summary in _SAMPLING:
        sampling.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=summary)
    sampling.add_argument("--seed", type=int, help="of the random numbers")
    ranks = parser.add_argument_group("the ranks")
    ranks.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is some, by default")
    ranks.add_argument("--timeout", type=float, metavar="S", help="seconds to wait for a rank (600; with --rank a day)")
    ranks.add_argument("--dump-dir", metavar="DIR", help="each rank's graph after each pass, as text")
    ranks.add_argument("--no-verify", action="store_true", help="do not prove the ranks' programs first")
    ranks.add_argument("--rank", type=at_least(0), metavar="R", help="run this rank only, here")
    ranks.add_argument("--world-size", type=at_least(1), metavar="W", help="ranks in all, with --rank")
    ranks.add_argument("--master-addr", metavar="A", help="address of rank 0, with --rank")
    ranks.add_argument("--master-port", type=at_least(1), metavar="P", help="a free port there, with --rank")


def run(args: argparse.Namespace) -> int:
    be_quiet()
    prompts = _prompts(args)
    if args.rank is None and (args.world_size, args.master_addr, args.master_port) != (None, None, None):
        raise AutodistError("--world-size, --master-addr and --master-port say where --rank R belongs: add --rank")
    plan = PartitionPlan.load(args.plan) if args.plan else None
    mesh = mesh_of(plan, args.tp, args.pp)
    if args.rank is None and not started_by_torchrun() and mesh.size > 1:
        return _start_ranks(args, prompts, mesh)
    _generate(args, prompts, plan, mesh)
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    if (args.prompt is None) == (args.batch_file is None):
        raise AutodistError("give either --prompt TEXT or --batch-file FILE (one prompt a line)")
    if args.batch_file is None:
        return [args.prompt]
    try:
        lines = Path(args.batch_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AutodistError(f"cannot read --batch-file {args.batch_file}: {error}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise AutodistError(f"--batch-file {args.batch_file} holds no prompt: write one a line")
    return prompts


def _start_ranks(args: argparse.Namespace, prompts: list[str], mesh: Mesh) -> int:
    """Look at everything and plan here, once: what is wrong is then said once, and the ranks need not search."""
    choose_device(args.device, mesh.size - 1, mesh.size)
    checkpoint = resolve(args.model, revision=args.revision, cache_dir=args.cache_dir)
    encode(load_tokenizer(checkpoint), prompts, chat=not args.no_chat_template)
    compiled = compile_for(args, checkpoint.config, wanted_dtype(args.dtype, checkpoint.config))
    with tempfile.TemporaryDirectory(prefix="autodist-fx-") as directory:
        plan_file = str(Path(directory) / "plan.json")
        compiled.plan.save(plan_file)
        # The last --plan counts.
        return launch_local(
            [sys.executable, "-m", "autodist_fx.cli.main", *args.argv, "--plan", plan_file], mesh.size
        )


def _generate(args: argparse.Namespace, prompts: list[str], plan: PartitionPlan | None, mesh: Mesh) -> None:
    """This process is a rank."""
    began = time.perf_counter()
    # First, since a prompt that cannot be encoded should not wait for the weights.
    checkpoint = resolve(args.model, revision=args.revision, cache_dir=args.cache_dir)
    tokenizer = load_tokenizer(checkpoint)
    if checkpoint.config.is_encoder_decoder:
        tokenizer.padding_side = "right"  # an encoder counts its positions from the left
    inputs = encode(tokenizer, prompts, chat=not args.no_chat_template)
    model = from_pretrained(
        args.model,
        tp=mesh.tp,
        pp=mesh.pp,
        dtype=args.dtype,
        device=args.device,
        **({} if plan is not None else planning_options(args)),
        plan=plan,
        revision=args.revision,
        cache_dir=args.cache_dir,
        verify=not args.no_verify,
        dump_dir=args.dump_dir,
        timeout=args.timeout or (DEFAULT_TIMEOUT_SECONDS if args.rank is None else _DAY),
        rank=args.rank,
        world_size=args.world_size,
        master_addr=args.master_addr,
        master_port=args.master_port,
    )
    load_seconds = time.perf_counter() - began
    speaks = model.rank == 0 or args.rank is not None
    streams = speaks and not args.json and len(prompts) == 1 and (args.num_beams or 1) == 1
    text = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
    streamer = TimedStreamer(text) if (args.num_beams or model.generation_config.num_beams or 1) == 1 else None
    if args.seed is not None:
        transformers.set_seed(args.seed)
    start = time.perf_counter()
    output = model.generate(
        **{name: value.to(model.device) for name, value in inputs.items()},
        max_new_tokens=args.max_new_tokens,
        streamer=streamer,
        **_options(args, model.generation_config, tokenizer),
    )
    seconds = time.perf_counter() - start
    if not speaks:
        return
    eos = model.generation_config.eos_token_id
    ends = [eos] if isinstance(eos, int) else eos or []
    is_decoder_only = not model.config.is_encoder_decoder
    answers = split_answers(tokenizer, prompts, inputs, output.cpu(), ends, after_prompt=is_decoder_only)
    timings = _timings(load_seconds, seconds, answers, streamer, start)
    if args.json:
        print(json.dumps(_as_dict(args, mesh, model, answers, timings), ensure_ascii=False))
    else:
        _print(answers, timings, mesh, streamed=streams)


def _options(args: argparse.Namespace, defaults: transformers.GenerationConfig, tokenizer: Any) -> dict[str, Any]:
    """What generate() is to be told beside the prompt."""
    options = {name: getattr(args, name) for name, *_ in _SAMPLING if getattr(args, name) is not None}
    if args.do_sample is not None:
        options["do_sample"] = args.do_sample
    elif {"temperature", "top_k", "top_p", "min_p", "typical_p"} & options.keys():
        options["do_sample"] = True  # who names them wants them used
    if defaults.pad_token_id is None:
        options["pad_token_id"] = tokenizer.pad_token_id
    return options


def _timings(
    load_seconds: float, seconds: float, answers: list[Answer], streamer: TimedStreamer | None, start: float
) -> dict[str, float | int | None]:
    tokens = sum(len(answer.token_ids) for answer in answers)
    stamps = streamer.token_stamps if streamer is not None else []
    steps = len(stamps) - 1
    return {
        "load_seconds": load_seconds,
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
        "model": args.model,
        "tp": mesh.tp,
        "pp": mesh.pp,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "answers": [answer.as_dict() for answer in answers],
        "timings": timings,
        "load": {"shard_bytes": report.shard_bytes, "bytes_read": report.bytes_read},
    }


def _print(answers: list[Answer], timings: dict[str, Any], mesh: Mesh, *, streamed: bool) -> None:
    if not streamed:
        for number, answer in enumerate(answers, 1):
            print(f"[{number}] {answer.prompt}\n{answer.text}\n")
    else:
        print()
    first, each = timings["time_to_first_token_seconds"], timings["seconds_per_token"]
    parts = [f"{mesh.size} rank{'s' if mesh.size > 1 else ''} ({mesh})", f"ready in {timings['load_seconds']:.1f} s"]
    if first is not None:
        parts.append(f"first token after {first * 1e3:.0f} ms")
    if each is not None:
        parts.append(f"{each * 1e3:.1f} ms a token")
    parts.append(f"{timings['new_tokens']} tokens, {timings['tokens_per_second']:.1f} tokens/s")
    print("; ".join(parts), flush=True)


