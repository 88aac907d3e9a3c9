"""One rank that does what test_generate.py asks. `generate_worker.py CHECKPOINT TP PP DIRECTORY`

Writes DIRECTORY/RANK.pt: the result of every case in `CASES`, and the logits of a whole batch.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, set_seed

import autodist_fx as adx

PROMPT = torch.tensor([[5, 6, 7, 8]])
BATCH = torch.tensor([[9, 10, 11, 12, 13], [0, 0, 14, 15, 16], [0, 0, 0, 0, 17]])
MASK = (BATCH != 0).long()
CASES = {
    "greedy": (PROMPT, torch.ones_like(PROMPT), {"do_sample": False}),
    "sampled": (PROMPT, torch.ones_like(PROMPT), {"do_sample": True, "temperature": 0.9, "top_k": 20}),
    "left padding": (BATCH, MASK, {"do_sample": False}),
    # about one row in three ends early, since so many ids end it
    "eos": (BATCH, MASK, {"do_sample": False, "eos_token_id": list(range(20, 36))}),
    "beams": (PROMPT, torch.ones_like(PROMPT), {"do_sample": False, "num_beams": 3}),
}


def auto_class(checkpoint):
    is_seq2seq = AutoConfig.from_pretrained(checkpoint).is_encoder_decoder
    return AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM


def results(model) -> dict[str, torch.Tensor]:
    found = {}
    decoder = {"decoder_input_ids": BATCH} if model.config.is_encoder_decoder else {}
    alone = {"decoder_input_ids": PROMPT} if model.config.is_encoder_decoder else {}
    for name, (ids, mask, options) in CASES.items():
        set_seed(11)
        found[name] = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, pad_token_id=0, **options)
    with torch.no_grad():
        found["logits"] = model(input_ids=BATCH, attention_mask=MASK, **decoder).logits
        found["logits without a mask"] = model(input_ids=PROMPT, **alone).logits
    return found


if __name__ == "__main__":
    checkpoint, tp, pp, directory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    split = adx.from_pretrained(checkpoint, tp=tp, pp=pp, device="cpu", timeout=60)
    split.microbatches = 2  # with pp > 1, of the cases with several rows
    found = results(split)
    found["loaded"] = torch.tensor([split.load_report.bytes_read, split.load_report.checkpoint_bytes])
    if "--memory" in sys.argv:  # the same from a model that every rank has in memory
        whole = auto_class(checkpoint).from_pretrained(checkpoint)
        again = adx.compile(whole, tp=tp, pp=pp).to_distributed(device="cpu", timeout=60)
        found |= {f"{name} from memory": value for name, value in results(again).items()}
    torch.save(found, directory / f"{split.rank}.pt")
