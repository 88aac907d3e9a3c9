"""How long all rank programs of a large model take to compile, and the peak RSS, from the config alone on meta.

python benchmarks/compile_time.py SHAPE LAYERS [--tp 8 --pp 4]       one measurement, as a JSON line
                                              [--train --dp 2]       of programs to be trained, and of 1F1B's order

A process of its own for each measurement, so that none profits from another's caches or adds to its peak. The largest
mixture of experts takes minutes, and is measured with `benchmarks/run.py --large` only.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import shapes
from memory import peak_rss_bytes
from processes import HERE, rank_environment

# shape, layers, tp, pp
MEASUREMENTS = (
    ("llama_3_70b", 20, 8, 4),
    ("llama_3_70b", 40, 8, 4),
    ("llama_3_70b", 80, 8, 4),
    ("qwen_2_5_7b", 28, 8, 4),
    ("mixtral_8x7b", 32, 8, 1),
)
TRAINED = (("llama_3_70b", 80, 8, 4, 2),)  # and dp
MICROBATCHES = 8
LARGE = (("qwen_3_30b_a3b", 48, 8, 1), ("deepseek_v3", 61, 8, 8))
TIMEOUT_SECONDS = 600


def measure(shape: str, layers: int, tp: int, pp: int) -> dict[str, Any]:
    """Trace and plan, then emit every rank's program, then verify all of them together."""
    import autodist_fx as adx

    config = getattr(shapes, shape)(num_hidden_layers=layers)
    imports_rss = peak_rss_bytes()
    start, start_cpu = time.perf_counter(), time.process_time()
    compiled = adx.compile(config, tp=tp, pp=pp, use_cache=True, verify=False)  # verified below, timed apart
    assert compiled.plan is not None
    planned = time.perf_counter()
    nodes = sum(len(compiled.program(rank).graph_module.graph.nodes) for rank in range(tp * pp))
    emitted = time.perf_counter()
    compiled.verify()
    verified = time.perf_counter()
    return _figures((start, planned, emitted, verified), start_cpu, nodes, imports_rss)


def measure_training(shape: str, layers: int, tp: int, pp: int, dp: int) -> dict[str, Any]:
    """Do so with the programs of a training step, by the engine's own way; verifying includes that no rank of the
    schedule waits for ever. Replicas have the same programs."""
    import torch

    from autodist_fx.compiler.compile_options import CompileOptions
    from autodist_fx.runtime.default_hardware import default_hardware
    from autodist_fx.runtime.training.schedules import make_schedule
    from autodist_fx.tracing import empty_model
    from autodist_fx.training.programs import TrainingPrograms
    from cost_model.request.plan_options import PlanOptions

    imports_rss = peak_rss_bytes()
    start, start_cpu = time.perf_counter(), time.process_time()
    model = empty_model(getattr(shapes, shape)(num_hidden_layers=layers)).train()
    request = PlanOptions.from_keywords(tp=tp, pp=pp).resolve(default_hardware())
    made = TrainingPrograms(model, request, None, CompileOptions())
    ids = torch.ones(1, 128, dtype=torch.long)
    variant = made.variant_for(made.read({"input_ids": ids, "labels": ids}))
    planned = time.perf_counter()
    nodes = dp * sum(len(p.graph_module.graph.nodes) for p in made.compiled.all_programs(variant))
    emitted = time.perf_counter()
    made.verify(variant)
    made.verify_schedule([[variant] * MICROBATCHES] * dp, make_schedule("1f1b", pp, MICROBATCHES))
    verified = time.perf_counter()
    return _figures((start, planned, emitted, verified), start_cpu, nodes, imports_rss)


def _figures(
    moments: tuple[float, float, float, float], start_cpu: float, nodes: int, imports_rss: int
) -> dict[str, Any]:
    """A row of the table: `moments` are when it began, and when all was planned, emitted and verified, in seconds;
    resident memory is in bytes."""
    start, planned, emitted, verified = moments
    return {
        "plan_seconds": planned - start,
        "emit_seconds": emitted - planned,
        "verify_seconds": verified - emitted,
        "total_seconds": verified - start,
        "cpu_seconds": time.process_time() - start_cpu,
        "nodes": nodes,
        "imports_rss": imports_rss,
        "peak_rss": peak_rss_bytes(),
    }


def run(large: bool = False) -> list[dict[str, Any]]:
    """All measurements, the largest where asked for; a failed one has "error" instead of figures."""
    results = []
    for shape, layers, tp, pp, *dp in (*MEASUREMENTS, *TRAINED, *(LARGE if large else ())):
        mesh = " x ".join(map(str, (tp, pp, *dp)))
        print(f"compile {shape}, {layers} layers, {mesh} ...", flush=True)
        command = [sys.executable, str(HERE / "compile_time.py"), shape, str(layers), f"--tp={tp}", f"--pp={pp}"]
        command += ["--train", f"--dp={dp[0]}"] if dp else []
        environment = rank_environment(rank=0, world_size=1, port=0, threads=1)
        try:
            child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
            outcome = json.loads(child.stdout) if child.returncode == 0 else {"error": last_line(child.stderr)}
        except subprocess.TimeoutExpired:
            outcome = {"error": f"not done after {TIMEOUT_SECONDS} s"}
        results.append({"shape": shape, "layers": layers, "mesh": f"{mesh}, to be trained" if dp else mesh, **outcome})
    return results


def last_line(text: str) -> str:
    """Returns the line of a traceback that says what went wrong."""
    return (text.strip().splitlines() or ["no message"])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=sorted({shape for shape, *_ in (*MEASUREMENTS, *LARGE, *TRAINED)}))
    parser.add_argument("layers", type=int)
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--pp", type=int, default=4)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--dp", type=int, default=1)
    args = parser.parse_args()
    mesh = args.tp, args.pp
    trained = measure_training(args.shape, args.layers, *mesh, args.dp) if args.train else None
    print(json.dumps(trained or measure(args.shape, args.layers, *mesh)))


if __name__ == "__main__":
    main()
