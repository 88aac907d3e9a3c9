"""One rank that generates with every checkpoint in a folder. `families_worker.py CHECKPOINTS TP PP RESULTS`

One process for all of them: starting one takes longer than all the models. Writes RESULTS/RANK.pt: by the checkpoint's
name the tokens of each way to generate, and the bytes that the rank read, of how many.
"""

import sys
from pathlib import Path

import torch
from transformers import set_seed

import autodist_fx as adx

BATCH = torch.tensor([[9, 10, 11, 12, 13], [0, 0, 14, 15, 16]])
MASK = (BATCH != 0).long()


def generated(model) -> dict[str, list[list[int]]]:
    """The second prompt is padded on the left; no row ends early."""
    found = {}
    for name, options in {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "top_k": 30}}.items():
        set_seed(11)
        found[name] = model.generate(
            input_ids=BATCH, attention_mask=MASK, max_new_tokens=8, min_new_tokens=8, pad_token_id=0, **options
        ).tolist()
    return found


if __name__ == "__main__":
    checkpoints, (tp, pp), results = Path(sys.argv[1]), map(int, sys.argv[2:4]), Path(sys.argv[4])
    found = {}
    for checkpoint in sorted(checkpoints.iterdir()):
        split = adx.from_pretrained(checkpoint, tp=tp, pp=pp, device="cpu", timeout=60)
        report = split.load_report
        found[checkpoint.name] = generated(split), torch.tensor([report.bytes_read, report.checkpoint_bytes])
    torch.save(found, results / f"{split.rank}.pt")
