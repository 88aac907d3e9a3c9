"""Measure autodist_fx against other ways to split a model; print the tables and write docs/benchmarks.md.

python benchmarks/run.py [--rounds 5] [--contenders ours,megatron_tp,...] [--skip compile,loading] [--busy]
                         [--large] [--out FILE]

Some minutes on two cores. Ends with 1 when a contender failed or gave other output than the single process.
"""

import argparse
import contextlib
import shlex
import sys
from pathlib import Path

import compile_time
import loading
import report
import turns
from contenders import ENTRIES
from fine_tuning import bubbles, ratios
from pipelines import full
from processes import HERE, half_busy_core

TURNS_TEXT = f"""\
Llama shape: hidden 768, intermediate 2048, 12 layers, 12 heads, 4 KV heads, vocabulary 32000, float32, random weights.
Two ranks of one thread each on Gloo over loopback. Forward is batch 4 x 128 without cache and ends with full logits on
every rank; decode is greedy with a KV cache, a prompt of 128 tokens and {turns.NEW_TOKENS} new ones, prefill included;
prefill ends with the first token, and a decode step is (decode - prefill) / {turns.NEW_TOKENS - 1}.
Contenders take turns in {{rounds}} rounds and compute one at a time.
Median, and in parentheses lowest and highest; ratios are taken within a round."""

BUSY_TEXT = " One of the two cores was kept half busy."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contenders", default=",".join(ENTRIES), help="of: %(default)s")
    parser.add_argument("--skip", default="", help="of: turns,pipeline,training,compile,loading")
    parser.add_argument("--busy", action="store_true", help="keep one core half busy while contenders take turns")
    parser.add_argument("--large", action="store_true", help="compile the largest mixture of experts, too: minutes")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "benchmarks.md")
    parser.add_argument("--pipeline-rank", nargs=2, help=argparse.SUPPRESS)  # whose, and of which checkpoint
    parser.add_argument("--training-rank", nargs=2, help=argparse.SUPPRESS)  # which way, and of which checkpoint
    args = parser.parse_args()
    if args.training_rank:
        name, path = args.training_rank
        bubbles.serve_rank(path) if name == "bubbles" else ratios.serve_rank(name, path)
        return 0
    if args.pipeline_rank:
        full.serve_rank(*args.pipeline_rank)
        return 0
    skip = args.skip.split(",")

    command = shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]])
    sections = ["# Benchmarks\n\nWritten by `make bench`.", report.machine(command)]
    wrong = False
    if "turns" not in skip:
        with half_busy_core() if args.busy else contextlib.nullcontext():
            results = turns.run(args.contenders.split(","), args.rounds)
        wrong = any(r.error or not r.agrees for r in results)
        sections += [
            "## Forward and decode\n\n" + TURNS_TEXT.format(rounds=args.rounds) + (BUSY_TEXT if args.busy else ""),
            report.speed_table(results),
            report.ratio_table(results),
            "Collectives on rank 0, counted by torch.profiler as ops of the `c10d` namespace; ours, which go over the "
            "backend itself,\nby its communicator (send: the step's token ids):",
            report.collectives_table(results),
        ]
    if "pipeline" not in skip:
        filled = full.run(list(full.WORKS), args.rounds)
        wrong |= not all(r.agrees for r in filled)
        sections += [
            "## A pipeline that is kept full\n\npp=2 with one microbatch at a time, with as many as the plan "
            "chooses, and transformers' own pp=2, in turns;\nthe forecast is the plan's own.",
            full.results_table(filled),
        ]
    if "training" not in skip:
        trained = ratios.run(args.rounds)
        wrong |= any(group.errors or not group.agrees for group in trained)
        sections += [
            "## Training\n\nSeconds of a step, AdamW, on two ranks of one thread each; the ways of a group in turns, "
            "from one checkpoint\non the same rows. Ratios are taken within a round.",
            ratios.results_table(trained),
            "What the ranks of a pipeline wait in a step, on each schedule (pp=2, 8 x 128, 8 microbatches):",
            bubbles.results_table(bubbles.run(args.rounds)),
        ]
    if "compile" not in skip:
        compiled = compile_time.run(args.large)
        wrong |= any("error" in r for r in compiled)
        sections += [
            "## Compiling\n\nFrom a config on the meta device: plan, then the programs of all ranks, then their "
            "verification, in a\nprocess of its own for each row.",
            report.compile_table(compiled),
        ]
    if "loading" not in skip:
        loaded = loading.run()
        wrong |= any("error" in r for r in loaded)
        sections += [
            "## Loading\n\nQwen2.5-0.5B's shape, float32, tied embeddings, tp=2. Peak is VmHWM above the RSS after all "
            "imports, with every\nweight read once. Bytes read by read(2) and from disk are rchar and read_bytes of "
            "/proc/self/io: what is read through a\nmapping is in the latter only, with read-ahead, and the ranks "
            "share what either fetched.",
            report.loading_table(loaded),
        ]
    text = "\n\n".join(sections) + "\n"
    print("\n" + text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)
    print(f"written to {args.out}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
