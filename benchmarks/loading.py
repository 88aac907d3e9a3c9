"""Peak RSS and bytes read while a 2 GB checkpoint is loaded at tp=2.

python benchmarks/loading.py            (also part of benchmarks/run.py)

Each rank may hold little more than its shard, and none may read the whole file. Every weight is read once before the
peak is taken: one that is only mapped from the file is not in memory yet, but will be when the model runs.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import memory
import shapes
from processes import RankError, Ranks, answer, serve

SIDES = {"ours": "autodist_fx", "transformers_tp": 'transformers tp_plan="auto"'}


def load(side: str, path: str) -> dict[str, Any]:
    """In a rank's process: what loading adds to the memory that imports take."""
    # Everything that either side would import lazily while loading, so that it does not count as loading.
    import torch
    import torch.distributed.tensor.parallel
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401
    from transformers import AutoModelForCausalLM

    if side == "ours":
        import autodist_fx as adx

    before_rss, before_read = memory.reset_peak_rss(), memory.read_bytes()
    if side == "ours":
        model = adx.from_pretrained(path, tp=2)
        extra = {
            "shard_bytes": model.load_report.shard_bytes,
            "reported_bytes_read": model.load_report.bytes_read,
        }
    else:
        model = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", dtype=torch.float32)
        extra = {"shard_bytes": sum(w.numel() * w.element_size() for w in local_weights(model))}
    after = memory.read_bytes()
    for weight in local_weights(model):
        weight.sum()
    return {
        "imports_rss": before_rss,
        "peak_above_imports": memory.peak_rss_bytes() - before_rss,
        "read": after["read"] - before_read["read"],
        "disk": after["disk"] - before_read["disk"],
        **extra,
    }


def local_weights(model: Any) -> Iterator[Any]:
    """Returns what this rank holds of the parameters: of a DTensor its own part."""
    for parameter in model.parameters():
        parameter = parameter.detach()
        yield parameter.to_local() if hasattr(parameter, "to_local") else parameter


def run() -> list[dict[str, Any]]:
    """One row a side and rank."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="adx-bench-") as directory:
        checkpoint = Path(directory) / "model"
        print("write a checkpoint of Qwen2.5-0.5B's shape (2 GB) ...", flush=True)
        shapes.write_checkpoint(shapes.qwen_2_5_0_5b(), checkpoint)
        files = list(checkpoint.glob("*.safetensors"))
        file_bytes = sum(f.stat().st_size for f in files)
        for side, title in SIDES.items():
            print(f"load it with {title} ...", flush=True)
            for file in files:
                memory.drop_from_page_cache(file)
            ranks = Ranks("loading.py", [side, str(checkpoint)], world_size=2, threads=1, log=Path(directory) / side)
            try:
                outcomes = ranks.read()
            except RankError as error:
                outcomes = [{"error": str(error)}]
            finally:
                ranks.close()
            rows += [{"side": title, "rank": r, "file_bytes": file_bytes, **o} for r, o in enumerate(outcomes)]
    return rows


def main() -> None:
    if len(sys.argv) == 3:
        answer(load, side=sys.argv[1], path=sys.argv[2])
        serve({})  # stay until the other rank has answered
        return
    import report

    print(report.loading_table(run()))


if __name__ == "__main__":
    main()
