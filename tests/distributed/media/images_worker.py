"""One rank that answers questions about images. `images_worker.py TP PP FAMILY...`

Each rank makes the whole tiny model, too: what it generates is the truth, and is compared here.
"""

import sys

import torch

import autodist_fx as adx
from tests.support.media.images import question, vision_model

OPTIONS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}

if __name__ == "__main__":
    (tp, pp), families = map(int, sys.argv[1:3]), sys.argv[3:]
    for family in families:
        model = vision_model(family)
        one, mixed = question(family, (1,)), question(family, (1, 0, 2))
        asked = [(one, {}), (mixed, {}), (question(family, (0, 0)), {}), (one, {"num_beams": 2})]
        with torch.no_grad():
            wanted = [model.generate(**batch, **OPTIONS, **more).tolist() for batch, more in asked]
            logits = model(**one).logits
        split = adx.compile(model, tp=tp, pp=pp).to_distributed(timeout=60)
        for (batch, more), tokens in zip(asked, wanted, strict=True):
            assert split.generate(**batch, **OPTIONS, **more).tolist() == tokens, (family, more)
        assert float((split(**one).logits - logits).abs().max()) <= 1e-6 * float(logits.abs().max()), family
