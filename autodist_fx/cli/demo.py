"""`make demo`: SmolLM2-135M split three ways by real processes, and compared with plain transformers in one.

python -m autodist_fx.cli.demo [--model PATH]      exit code 0 when every token is equal
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TextStreamer

from autodist_fx.api.from_pretrained import from_pretrained
from autodist_fx.cli.arguments import be_quiet
from autodist_fx.cli.generation.prompts import encode, split_answers
from autodist_fx.compiler.compilation import Compilation
from autodist_fx.compiler.compile import compile_for_generation
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.launch import launch_local
from autodist_fx.runtime.default_hardware import default_hardware
from autodist_fx.tracing import empty_model
from autodist_fx.weights.checkpoint import Checkpoint, load_tokenizer
from autodist_fx.weights.checkpoint_source import CheckpointSource
from autodist_fx.weights.dtype import wanted_dtype
from autodist_fx.weights.resolve import SMOLLM2, resolve
from autodist_fx.weights.sources.gguf_file import forget
from cost_model.mesh import Mesh
from cost_model.partition_plan import PartitionPlan
from cost_model.request.plan_options import PlanOptions

QUESTION = "What is the capital of France?"
BATCH = (
    "What is the capital of France?",
    "Hello!",
    "I have three apples, eat one, and buy five more at the market. How many apples do I have now?",
)
MESHES = (Mesh(tp=2), Mesh(pp=2), Mesh(tp=2, pp=2))
NEW_TOKENS = 24


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="another model: a directory, a .gguf file or a hub id")
    # Numbers of open files: this process is a rank that main started.
    parser.add_argument("--rank-files", type=int, nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    be_quiet()
    try:
        if args.rank_files:
            _be_a_rank(args.model, args.rank_files)
            return 0
        return _demo(args.model)
    except AutodistError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _demo(name: str) -> int:
    """Run the demo, print each step, and return the exit code."""
    began = time.perf_counter()
    checkpoint = resolve(CheckpointSource(name))
    mesh = MESHES[-1]
    _say(f"1. How autodist-fx plan --model {name} --tp {mesh.tp} --pp {mesh.pp} would split it")
    model = empty_model(checkpoint.config, wanted_dtype(None, checkpoint.config))
    options = CompileOptions(verify=False)
    requests = [PlanOptions(tp=mesh.tp, pp=mesh.pp).resolve(default_hardware()) for mesh in MESHES]
    plans = [compile_for_generation(model, Compilation, request, options).plan for request in requests]
    print(plans[-1])

    _say("2. One process, plain transformers: AutoModelForCausalLM.from_pretrained(...).generate(), greedy")
    expected = _reference(checkpoint)
    wrong = []
    for number, plan in enumerate(plans, 3):
        mesh = plan.mesh
        _say(f"{number}. {mesh}: {mesh.size} processes over Gloo, each with its own slices and its own graph")
        answers = _on(plan, name)
        if answers is None:
            return 1
        wrong += [f"{mesh}, rank {rank}: {difference}" for rank, a in answers for difference in _compare(a, expected)]
        same = not any(line.startswith(f"{mesh},") for line in wrong)
        print("   -> the tokens of the single process, on every rank" if same else "   -> NOT the same tokens")

    _say("Result")
    for line in wrong:
        print(f"   {line}")
    if wrong:
        print("   Some tokens differ from those of the single process: this is a bug, please report it.")
        return 1
    print(f"   {', '.join(map(str, MESHES))}: all three gave the tokens of the single process, greedy:")
    count = len(expected["question"])
    print(f"   {count} tokens of the answer, and up to {NEW_TOKENS} for each of a batch of {len(BATCH)} prompts of")
    print(f"   different lengths, padded on the left. {time.perf_counter() - began:.0f} s in all.")
    return 0


def _reference(checkpoint: Checkpoint) -> dict[str, Any]:
    """Generate with plain transformers in this process, and return the tokens that every rank must give."""
    tokenizer = load_tokenizer(checkpoint)
    keywords = {"gguf_file": checkpoint.paths[0].name} if checkpoint.source_kind == "gguf" else {}
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(str(checkpoint.directory), **keywords).eval()
    forget()
    print(f"   loaded in {time.perf_counter() - began:.1f} s")
    return _answer(model, tokenizer, aloud=True)


def _answer(model: Any, tokenizer: Any, *, aloud: bool) -> dict[str, Any]:
    """Generate greedily; return the token ids of the question's answer, and of those to each prompt of the batch."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    inputs = encode(tokenizer, [QUESTION], chat=True)
    if aloud:
        print(f"   {QUESTION}  ", end="", flush=True)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if aloud else None
    began = time.perf_counter()
    output = model.generate(**inputs, **options, streamer=streamer)
    eos = model.generation_config.eos_token_id
    ends = [eos] if isinstance(eos, int) else eos or []
    question = split_answers(tokenizer, [QUESTION], inputs, output, ends)[0].token_ids
    each = (time.perf_counter() - began) / max(len(question), 1)
    inputs = encode(tokenizer, BATCH, chat=True)
    output = model.generate(**inputs, **options)
    batch = split_answers(tokenizer, BATCH, inputs, output, ends)
    if aloud:
        print(f"   {len(question)} tokens, {each * 1e3:.0f} ms each; and a batch of {len(BATCH)} prompts:")
        for answer in batch:
            text = " ".join(answer.text.split())
            print(f"   [{answer.prompt_tokens:2d} tokens] {text[:100]}{'...' if len(text) > 100 else ''}")
    return {"question": question, "batch": [answer.token_ids for answer in batch]}


def _on(plan: PartitionPlan, name: str) -> list[tuple[int, dict[str, Any]]] | None:
    """Run the ranks of the plan's mesh as processes, and return (rank, answers) of each; None where a rank failed."""
    with contextlib.ExitStack() as stack:  # files without names: nothing is left, however this process ends
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(1 + plan.mesh.size)]
        numbers = [file.fileno() for file in files]
        plan.save(_file(numbers[0]))  # so that no rank searches again
        told = ["--rank-files", *map(str, numbers)]
        command = [sys.executable, "-m", "autodist_fx.cli.demo", "--model", name, *told]
        code = launch_local(command, plan.mesh.size, keep_open=numbers)
        if code:
            print(f"   {plan.mesh}: failed with exit code {code}", file=sys.stderr)
            return None
        return [(rank, json.loads(_file(number).read_text())) for rank, number in enumerate(numbers[1:])]


def _file(number: int) -> Path:
    """Return the path by which this process opens a file that is open already."""
    return Path(f"/dev/fd/{number}")


def _be_a_rank(name: str, files: Sequence[int]) -> None:
    """Run as one rank: read the plan from the first of the open files, generate, and write the answers into this
    rank's, which follow."""
    began = time.perf_counter()
    model = from_pretrained(name, plan=_file(files[0]), device="cpu")
    tokenizer = load_tokenizer(resolve(CheckpointSource(name)))
    report = model.load_report
    if model.rank == 0:
        print(
            f"   ready in {time.perf_counter() - began:.1f} s; rank 0 holds {report.shard_bytes / 2**20:.0f} MiB of "
            f"weights"
        )
    answers = _answer(model, tokenizer, aloud=model.rank == 0)
    _file(files[1 + model.rank]).write_text(json.dumps(answers))


def _compare(answers: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Describe each difference between two sets of answers; [] where all tokens are equal."""
    pairs = [("the question", answers["question"], expected["question"])]
    pairs += [(f"prompt {i} of the batch", a, b) for i, (a, b) in enumerate(zip(answers["batch"], expected["batch"]))]
    found = []
    for what, got, wanted in pairs:
        if got != wanted:
            first = next((i for i, (a, b) in enumerate(zip(got, wanted)) if a != b), min(len(got), len(wanted)))
            found.append(f"{what}: token {first} differs: {got[first:][:5]} instead of {wanted[first:][:5]}")
    return found


def _say(title: str) -> None:
    print(f"\n== {title}", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
