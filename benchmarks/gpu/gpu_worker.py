"""Takes one check's part of gpu_check.py; stdout ends with what was found, as JSON (of --nccl: as a sentence).

    gpu_worker.py --reference DIR      writes a checkpoint there; transformers, in one process
    gpu_worker.py --rank '{...}'       generates, as one rank
    gpu_worker.py --train '{...}'      trains, as one rank
    gpu_worker.py --nccl               a group of one rank
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

PROMPT, NEW_TOKENS = 448, 128  # the middle of which has 512 tokens in its cache, which plans are made for


def main() -> int:
    """Do what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--reference", metavar="DIR")
    what.add_argument("--rank", type=json.loads, metavar="JSON")
    what.add_argument("--train", type=json.loads, metavar="JSON")
    what.add_argument("--nccl", action="store_true")
    asked = parser.parse_args()
    if asked.rank:
        return _rank(asked.rank)
    if asked.train:
        return _train(asked.train)
    return _nccl() if asked.nccl else _reference(asked.reference)


def _prompt() -> Any:
    import torch

    return torch.randint(3, 32000, (1, PROMPT), generator=torch.Generator().manual_seed(1))


def _timed(generate: Any) -> tuple[list[int], float]:
    """Return (new tokens, seconds a token of decoding): of a second call, without the prompt's own time."""
    import torch

    def seconds(tokens: int) -> tuple[float, Any]:
        torch.cuda.synchronize()
        began = time.perf_counter()
        found = generate(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        torch.cuda.synchronize()
        return time.perf_counter() - began, found

    seconds(NEW_TOKENS)  # kernels are chosen, graphs captured
    (one, _), (all_of_them, found) = seconds(1), seconds(NEW_TOKENS)
    return found[0, PROMPT:].tolist(), (all_of_them - one) / (NEW_TOKENS - 1)


def _reference(directory: str) -> int:
    """Write a checkpoint of the 125M shape with random weights, and generate with transformers, on the GPU."""
    import numpy
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=2048, initializer_range=0.05, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    model = model.to("cuda")
    with torch.no_grad():
        ids = _prompt().to("cuda")
        tokens, each = _timed(lambda **options: model.generate(ids, attention_mask=torch.ones_like(ids), **options))
        logits = _step_logits(model, ids, tokens)
    losses = _losses_of(model)
    half = LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).to("cuda").eval()
    with torch.no_grad():
        _, in_half = _timed(lambda **options: half.generate(ids, attention_mask=torch.ones_like(ids), **options))
        error = _distance(_step_logits(half, ids, tokens), logits)
    numpy.savez(f"{directory}/reference.npz", tokens=tokens, logits=logits.numpy())
    properties = torch.cuda.get_device_properties(0)
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    gpu = f"{properties.name}, {memory}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    found = {"tokens": tokens, "seconds_per_token": each, "losses": losses, "gpu": gpu}
    print(json.dumps(found | {"bf16_error": error, "bf16_seconds_per_token": in_half}))
    return 0


def _step_logits(model: Any, ids: Any, tokens: list[int]) -> Any:
    """Return the logits [steps, vocabulary] of generating `tokens`, whatever they say, in main memory. Steps behind the
    prompt are those that CUDA graphs replay."""
    import torch
    from transformers import LogitsProcessor

    class Forced(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            only = torch.full_like(scores, float("-inf"))
            only[:, tokens[input_ids.shape[1] - PROMPT]] = 0.0
            return only

    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(tokens), do_sample=False, pad_token_id=0,
        eos_token_id=None, logits_processor=[Forced()], output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert found.sequences[0, PROMPT:].tolist() == tokens
    return torch.cat(found.logits).float().cpu()


def _distance(x: Any, wanted: Any) -> float:
    """Return the distance of two tensors, as part of the second's length."""
    return float((x.double() - wanted.double()).norm() / wanted.double().norm())


def _losses_of(model: Any) -> list[float]:
    """Train a model for three steps as `adx.train` does by default, in one process, and return the losses."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    losses = []
    for batch in _batches("cuda"):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _batches(device: str) -> list[dict[str, Any]]:
    import torch

    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, 32000, (4, 128), generator=generator).to(device) for _ in range(3)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def _rank(asked: dict[str, Any]) -> int:
    """Generate as one rank; rank 0 prints what it measured."""
    import numpy
    import torch

    import autodist_fx as adx

    dtype = asked["dtype"]
    model = adx.from_pretrained(
        asked["model"], tp=asked["tp"], pp=asked["pp"], dtype=dtype, device="cuda", cuda_graphs=asked["graphs"]
    )
    ids = _prompt().to(model.device)
    tokens, each = _timed(lambda **options: model.generate(ids, attention_mask=torch.ones_like(ids), **options))
    error = None
    if dtype != "float32":  # else tokens say all
        wanted = numpy.load(f"{asked['model']}/reference.npz")
        logits = _step_logits(model, ids, wanted["tokens"].tolist())
        error = _distance(logits, torch.from_numpy(wanted["logits"]))
    if model.rank == 0:
        plan = model.plan
        found = {"tokens": tokens, "seconds_per_token": each, "predicted_seconds": plan.predicted_seconds}
        found["hardware"] = getattr(plan.hardware, "name", str(plan.hardware))
        print(json.dumps(found | {"bf16_error": error}))
    return 0


def _train(asked: dict[str, Any]) -> int:
    """Train as one rank; rank 0 prints the losses, and the seconds of the last step."""
    import autodist_fx as adx

    engine = adx.train(asked["model"], tp=asked["tp"], pp=asked["pp"], device="cuda")
    losses, seconds = [], 0.0
    for batch in _batches("cuda"):
        began = time.perf_counter()
        losses.append(float(engine.step(batch).loss))  # which waits for the device
        seconds = time.perf_counter() - began
    if 0 in engine.ranks:
        print(json.dumps({"losses": losses, "seconds": seconds}))
    return 0


def _nccl() -> int:
    """Sum over a group of one rank, then within a captured graph."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from autodist_fx.runtime.device import cuda

    device = torch.device("cuda", 0)
    cuda.claim(device)
    group = cuda.nccl_group(dist.HashStore(), 0, 1, timedelta(seconds=60), device)
    x = torch.arange(4.0, device=device)

    def doubled() -> torch.Tensor:
        y = x * 2
        group.allreduce([y]).wait()
        return y

    replay, y = cuda.Pool(device).capture(doubled)
    x.fill_(3.0)
    replay()
    assert doubled().tolist() == y.tolist() == [6.0] * 4
    version = ".".join(map(str, torch.cuda.nccl.version()))
    print(f"NCCL {version}: all_reduce, and all_reduce within a captured graph; {cuda.identity(device)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
