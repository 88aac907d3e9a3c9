"""Builds a tiny model of every type in transformers' mappings, splits it over meshes, and compares with the whole one.

    python benchmarks/coverage.py                                        everything; writes its version's section of
                                                                         docs/coverage.md
    python benchmarks/coverage.py --tasks causal-lm --types llama,gpt2   some, to look at (with --out)

Results are kept as lines of JSON beside the page, a file for each version. A later run takes those found
with the same code and versions; --resume takes older ones, too, --fresh none.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

import transformers
from model_coverage import report, results
from model_coverage.pool import Job, run_jobs
from model_coverage.sweeps import tables as sweep_tables
from model_coverage.tasks import SWEEPS, TASKS
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

GIB = 2**30


def main() -> None:
    arguments = _arguments()
    jobs = _jobs(arguments)
    if not jobs:
        sys.exit(f"error: no such types in {', '.join(arguments.tasks)}")
    out: Path = arguments.out
    lines = out.with_name(f"{out.stem}-{transformers.__version__}.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    state = results.state()
    known = {} if arguments.fresh else results.read(lines)
    swept = results.swept(arguments.sweeps, arguments.sweep_mesh)
    kept = results.usable(known.values(), arguments.mesh, None if arguments.resume else state, swept)
    keys = [(job["task"], job["type"]) for job in jobs]
    found = {key: kept[key] for key in keys if key in kept}
    todo = [job for job in jobs if (job["task"], job["type"]) not in found]
    if arguments.fresh:
        lines.unlink(missing_ok=True)
    started = time.perf_counter()
    _run(todo, len(found), arguments, lambda result: _keep(lines, found, {**result, "state": state}))
    seconds = time.perf_counter() - started if len(todo) == len(jobs) else 0.0
    command = shlex.join(["python", "benchmarks/coverage.py", *sys.argv[1:]])
    ordered = [found[key] for key in keys]
    states = sorted({result["state"] for result in ordered})
    written = report.sections_of(out.read_text("utf-8")) if out.exists() else {}
    written[transformers.__version__] = report.section(
        ordered, arguments.mesh, command, "; ".join(states), seconds, arguments.jobs
    )
    out.write_text(report.page(written), "utf-8")
    right = sum(report.is_right(result, arguments.mesh) for result in ordered)
    built = sum(result["built"] for result in ordered)
    print(f"{right} of {built} types that build ({len(ordered)} in all) right on {', '.join(arguments.mesh)}: {out}")


def _arguments() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=names, default=list(TASKS), help=f"of {', '.join(TASKS)}")
    parser.add_argument("--types", type=names, default=None, help="model types (default: all of the tasks)")
    parser.add_argument("--mesh", type=names, default=["2x1", "3x1", "1x2", "2x2"], help="tp x pp, by commas")
    parser.add_argument("--sweeps", type=names, default=list(SWEEPS), help=f"of {', '.join(SWEEPS)}; '' for none")
    parser.add_argument("--sweep-mesh", type=names, default=["2x1"], help="those of the sweeps, by commas")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes (%(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="limit for one mesh of one type (%(default)s)")
    parser.add_argument("--memory", type=float, default=4.0, help="GiB that a worker may have (%(default)s)")
    parser.add_argument("--out", type=Path, default=results.ROOT / "docs" / "coverage.md")
    parser.add_argument("--resume", action="store_true", help="take results found with older code or versions, too")
    parser.add_argument("--fresh", action="store_true", help="take no earlier results")
    arguments = parser.parse_args()
    if unknown := [task for task in arguments.tasks if task not in TASKS]:
        parser.error(f"unknown task {', '.join(unknown)}: choose of {', '.join(TASKS)}")
    if unknown := [sweep for sweep in arguments.sweeps if sweep not in SWEEPS]:
        parser.error(f"unknown sweep {', '.join(unknown)}: choose of {', '.join(SWEEPS)}")
    meshes = [*arguments.mesh, *arguments.sweep_mesh]
    if odd := [mesh for mesh in meshes if not all(part.isdigit() for part in mesh.split("x"))]:
        parser.error(f"a mesh is tp x pp, like 2x1, not {', '.join(odd)}")
    return arguments


def _jobs(arguments: argparse.Namespace) -> list[Job]:
    def sizes(meshes: list[str]) -> list[tuple[int, ...]]:
        return [tuple(map(int, mesh.split("x"))) for mesh in meshes]

    common = {
        "meshes": sizes(arguments.mesh),
        "sweeps": arguments.sweeps,
        "sweep_meshes": sizes(arguments.sweep_mesh),
        "seconds": arguments.seconds,
    }
    return [
        {"task": task, "type": name, "class": class_name, **common}
        for task in arguments.tasks
        for name, class_name in TASKS[task].types().items()
        if arguments.types is None or name in arguments.types
    ]


def _keep(lines: Path, found: dict[tuple[str, str], results.Result], result: results.Result) -> None:
    results.append(lines, result)
    found[result["task"], result["type"]] = result


def _run(todo: list[Job], already: int, arguments: argparse.Namespace, keep) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("types", total=len(todo) + already, completed=already)

        def started(job: Job) -> None:
            progress.update(bar, description=f"{job['task']}: {job['type']}")

        def done(result: results.Result) -> None:
            keep(result)
            progress.advance(bar)
            if not console.is_terminal:
                print(f"{result['task']} {result['type']}: {_in_short(result)}", file=sys.stderr, flush=True)
            elif not report.is_right(result, arguments.mesh) and result["built"]:
                progress.print(f"{result['task']} {result['type']}: {_in_short(result)}", highlight=False)

        checks = len(arguments.mesh) + 3 + 3 * len(arguments.sweep_mesh)
        limit = arguments.seconds * checks
        run_jobs(todo, arguments.jobs, limit, int(arguments.memory * GIB), started, done)


def _in_short(result: results.Result) -> str:
    if not result["built"]:
        return f"not built: {result['reason']}"
    verdicts = {mesh: entry["verdict"] for mesh, entry in result["meshes"].items()}
    for sweep, kinds in result.get("sweeps", {}).items():
        found = [sweep_tables.verdict(entries) for entries in kinds.values()]
        verdicts[sweep] = "right" if set(found) <= {"right", "right*", "-"} else " ".join(found)
    return ", ".join(f"{what} {verdict}" for what, verdict in verdicts.items())


if __name__ == "__main__":
    main()
