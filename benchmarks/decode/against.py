"""Decode with this checkout and with another one in turns, and print the ratios of their medians.

cd benchmarks; python -m decode.against OTHER [--other-python BIN] [--meshes 2x1,1x1] [--rounds 7] [--rows 1]

Both load one checkpoint of the 125M Llama shape, stay alive, and compute one at a time, in every round each of them
once and first in every other round. OTHER is a checkout of an earlier commit; one that needs other versions of
libraries has its own --other-python.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
from pathlib import Path

import markdown_table
import shapes
from processes import HERE, Ranks

NEW_TOKENS = 64
TITLES = ("this checkout", "the other")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="a directory with another checkout of this repository")
    parser.add_argument("--python", default=sys.executable, help="interpreter for this checkout (%(default)s)")
    parser.add_argument("--other-python", default=sys.executable, help="interpreter for the other (%(default)s)")
    parser.add_argument("--meshes", default="2x1,1x1", help="tp x pp, of one rank a core: %(default)s")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=1, help="prompts decoded together (%(default)s)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (%(default)s)")
    args = parser.parse_args()
    sides = ((HERE.parent, args.python), (args.other.resolve(), args.other_python))
    rows, same = [], True
    with tempfile.TemporaryDirectory(prefix="adx-bench-") as directory:
        shapes.write_checkpoint(shapes.bench_llama(), Path(directory) / "model")
        for mesh in args.meshes.split(","):
            found, alike = _one_mesh(mesh, sides, args, Path(directory))
            rows += found
            same &= alike
    header = ("mesh", *(f"{title}, {unit}" for unit in ("tok/s", "prefill ms", "step ms") for title in TITLES))
    print(markdown_table.table((*header, "decode", "prefill", "step"), rows))
    print(
        f"decode, prefill, step: the other's seconds over this checkout's, medians of {args.rounds} rounds; "
        f"{args.rows} x {args.prompt} tokens and {NEW_TOKENS} new ones. "
        f"Tokens are {'the same' if same else 'NOT THE SAME'}."
    )
    return int(not same)


def _one_mesh(
    mesh: str, sides: tuple[tuple[Path, str], ...], args: argparse.Namespace, directory: Path
) -> tuple[list[tuple[str, ...]], bool]:
    """Return the table's row of a mesh, and whether both gave the same tokens."""
    tp, pp = (int(n) for n in mesh.split("x"))
    prefill: list[list[float]] = [[], []]
    decode: list[list[float]] = [[], []]
    tokens: list[list[int]] = [[], []]
    with contextlib.ExitStack() as stack:
        alive = []
        for side, (checkout, python) in enumerate(sides):
            print(f"{mesh}: start {TITLES[side]} ({checkout}) ...", flush=True)
            worker = [str(checkout), str(directory / "model"), mesh, str(args.rows), str(args.prompt)]
            log = directory / f"{mesh}-{side}.log"
            ranks = Ranks("decode/worker.py", worker, tp * pp, 1, log, python=python, checkout=checkout)
            stack.callback(ranks.close)
            ranks.read()
            alive.append(ranks)
            tokens[side] = ranks.ask("decode", new_tokens=NEW_TOKENS)[0]["tokens"]  # warms up
        for number in range(args.rounds):
            for side in (0, 1) if number % 2 else (1, 0):
                prefill[side].append(_slowest(alive[side], 1))
                decode[side].append(_slowest(alive[side], NEW_TOKENS))
            print(f"{mesh}: round {number + 1}: " + ", ".join(f"{d[-1]:.3f} s" for d in decode), flush=True)
    speed, first = [statistics.median(d) for d in decode], [statistics.median(p) for p in prefill]
    step = [
        statistics.median((d - p) / (NEW_TOKENS - 1) for d, p in zip(decode[side], prefill[side], strict=True))
        for side in (0, 1)
    ]
    cells = [f"{args.rows * NEW_TOKENS / seconds:.1f}" for seconds in speed]
    cells += [f"{seconds * 1e3:.1f}" for pair in (first, step) for seconds in pair]
    ratios = [f"{theirs / ours:.2f}" for ours, theirs in (speed, first, step)]
    return [(mesh, *cells, *ratios)], tokens[0] == tokens[1]


def _slowest(ranks: Ranks, new_tokens: int) -> float:
    return max(answer["seconds"] for answer in ranks.ask("decode", new_tokens=new_tokens))


if __name__ == "__main__":
    sys.exit(main())
