"""One rank that generates with every checkpoint in a folder. `families_worker.py CHECKPOINTS TP PP RESULTS WAY...`

One process for all of them: starting one takes longer than all the models. Writes RESULTS/RANK.pt: by the checkpoint's
name the tokens of each way to generate, and the bytes that the rank read, of how many.
"""

import sys
from pathlib import Path

import torch
from transformers import set_seed

import autodist_fx as adx
from tests.support.generation.families import prompt

WAYS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 30},
    "beams": {"do_sample": False, "num_beams": 3},
}


def generated(model, ways, **options) -> dict[str, list[list[int]]]:
    """No row ends early."""
    found = {}
    for name in ways:
        set_seed(11)
        found[name] = model.generate(
            **prompt(model), max_new_tokens=8, min_new_tokens=8, pad_token_id=0, **WAYS[name], **options
        ).tolist()
    return found


if __name__ == "__main__":
    checkpoints, (tp, pp), results = Path(sys.argv[1]), map(int, sys.argv[2:4]), Path(sys.argv[4])
    found = {}
    for checkpoint in sorted(checkpoints.iterdir()):
        split = adx.from_pretrained(checkpoint, tp=tp, pp=pp, device="cpu", timeout=60)
        size = torch.tensor([split.load_report.bytes_read, split.load_report.checkpoint_bytes])
        found[checkpoint.name] = generated(split, sys.argv[5:]), size
    torch.save(found, results / f"{split.rank}.pt")
