"""Predict what plans take, then measure it; print the errors and write docs/predictions.md and its data.

python benchmarks/predictions.py [--hardware FILE] [--shapes llama-125m,...] [--out FILE]

None of the points was used to measure the machine. Without a file, the one of `autodist-fx measure` is taken, which
must have been run. About five minutes on two cores; each rank has one thread.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import report
import shapes
from predicting import figures, points
from processes import HERE, RankError, Ranks, answer, serve

from autodist_fx.measure.predict import Forecast
from autodist_fx.runtime.default_hardware import measured_file
from cost_model.costs.hardware import Hardware
from cost_model.request.hardware_file import load_hardware

TEXT = f"""\
Predicted for `{{name}}`, measured {{date}} by `autodist-fx measure`, before anything was run; no point was used to fit.
Two ranks of one thread each on two cores, float32, random weights. Forward: {points.BATCH} x {points.TOKENS} tokens
without a cache, full logits on every rank. Prefill: a prompt of {points.PROMPT} tokens and the first token, `generate`
included. Decode step: the tokens after it. Training step: {points.TRAIN_BATCH} x {points.TRAIN_TOKENS} tokens, AdamW,
two microbatches with pp=2. Seconds are medians of the slowest rank. Memory: the peak RSS of the fullest rank above that
before loading, against what the plan says. Regret: how much slower the plan that is predicted fastest is than the
fastest."""


def main() -> int:
    if sys.argv[1:] == ["--rank"]:
        return be_a_rank()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hardware", type=Path, help="a file of `autodist-fx measure` (this machine's)")
    parser.add_argument("--shapes", default=",".join(points.models()), help="of: %(default)s")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "predictions.md")
    args = parser.parse_args()
    file = args.hardware or measured_file("cpu")
    if not file.is_file():
        print(f"{file} is not there: run `autodist-fx measure` first", file=sys.stderr)
        return 2
    machine, about = load_hardware(file)
    found, failures = run(args.shapes.split(","), machine, str(file))
    command = shlex.join(["python", "benchmarks/predictions.py", *sys.argv[1:]])
    sections = [
        "# Predictions beside measurements\n\nWritten by `make bench`.",
        report.machine(command),
        TEXT.format(name=machine.name, date=about.measured),
        figures.summary(found, machine),
        figures.by_kind(found),
        *(f"{failure}" for failure in failures),
        "## All points",
        figures.all_points(found),
    ]
    text = "\n\n".join(sections) + "\n"
    print("\n" + text)
    data = args.out.parent / "data" / f"{args.out.stem}.json"
    data.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)
    data.write_text(json.dumps({"hardware": machine.name, "points": [asdict(p) for p in found]}, indent=1) + "\n")
    print(f"written to {args.out} and {data}")
    return int(bool(failures))


def run(names: list[str], machine: Hardware, file: str) -> tuple[list[points.Point], list[str]]:
    """Predict all points, then measure them; return those that were measured, and what failed."""
    configs = {name: config for name, config in points.models().items() if name in names}
    print("predict ...", flush=True)
    predicted: dict[tuple[str, str], list[points.Point]] = {}
    for name, config in configs.items():
        forecast = Forecast(config)
        for way in points.ways(name):
            predicted[name, way.name] = list(points.predicted(name, config, way, forecast, machine))
    found: list[points.Point] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="adx-bench-") as directory:
        paths = {name: Path(directory) / name for name in configs}
        for name, config in configs.items():
            print(f"write {name} ...", flush=True)
            shapes.write_checkpoint(config, paths[name])
        # A start of all ranks for each mesh, then one shape after the other.
        for mesh in dict.fromkeys(way.mesh for name in names for way in points.ways(name)):
            ranks = Ranks("predictions.py", ["--rank"], mesh.size, threads=1, log=Path(directory) / f"{mesh}.log")
            try:
                ranks.read()
                for name in names:
                    for way in points.ways(name):
                        if way.mesh == mesh:
                            measure(ranks, name, way, str(paths[name]), file, predicted[name, way.name])
                            found += predicted[name, way.name]
            except RankError as error:
                failures.append(f"{mesh}: {error}")
                print(ranks.log.read_text()[-4000:], file=sys.stderr)
            finally:
                ranks.close()
    return found, failures


def measure(
    ranks: Ranks, shape: str, way: points.Way, path: str, file: str, predicted: list[points.Point]
) -> None:
    """Fill in what was measured of a way's points; adds that of training. The slowest and the fullest rank count."""
    asked = {"path": path, "tp": way.mesh.tp, "pp": way.mesh.pp, "hardware": file, "pin": dict(way.pin)}
    answers = ranks.ask("generate", **asked)
    for point in predicted:
        point.measured_seconds = max(a[point.kind] for a in answers)
        point.measured_bytes = max(a["bytes"] for a in answers) if point.predicted_bytes else 0
    if not way.pin:
        answers = ranks.ask("train", **asked)
        trained = points.Point(shape, way.name, "training step", answers[0]["predicted"])
        trained.measured_seconds = max(a["training step"] for a in answers)
        trained.predicted_bytes = answers[0]["predicted_bytes"]
        trained.measured_bytes = max(a["bytes"] for a in answers)
        predicted.append(trained)
    print(f"{shape}, {way.name}: " + ", ".join(f"{p.kind} {p.error:+.0%}" for p in predicted), flush=True)


def be_a_rank() -> int:
    """Answer until stdin closes."""
    from predicting import rank

    answer(dict)
    serve({"generate": rank.generate, "train": rank.train})
    return 0


if __name__ == "__main__":
    sys.exit(main())
