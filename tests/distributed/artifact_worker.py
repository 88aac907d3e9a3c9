"""One rank that does what test_artifact.py asks. `artifact_worker.py load ARTIFACT DIRECTORY`, or
`artifact_worker.py cache CHECKPOINT DIRECTORY CACHE TP PP`. Writes DIRECTORY/RANK.pt."""

import json
import sys
import warnings
from pathlib import Path

import torch

import autodist_fx as adx


def model_code():
    return [name for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name]


if __name__ == "__main__":
    imported = model_code()  # by what this process was forked from
    what, source, directory = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if what == "load":
            split = adx.load(source, device="cpu", timeout=60)
        else:
            tp, pp = int(sys.argv[5]), int(sys.argv[6])
            split = adx.from_pretrained(source, tp=tp, pp=pp, device="cpu", timeout=60, cache=sys.argv[4])
    if what == "load":
        split.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert model_code() == imported
    from tests.distributed.generate_worker import results  # which imports transformers' models

    torch.save(results(split), directory / f"{split.rank}.pt")
    told = [str(w.message) for w in said if "cache" in str(w.message)]
    (directory / f"{split.rank}.json").write_text(json.dumps({"warnings": told}))
