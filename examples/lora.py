"""Train a LoRA adapter over ranks with peft's model and the engine's own step; the model's weights stay as they are.

    torchrun --nproc-per-node 2 examples/lora.py HuggingFaceTB/SmolLM2-135M texts.jsonl --pp 2 --out adapter

texts.jsonl has a line {"text": ...} for each text. With --simulate all ranks are in this one process, to try it out.
"""

import argparse
import functools
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import autodist_fx as adx

parser = argparse.ArgumentParser()
parser.add_argument("model", help="a directory, or an id on the hub")
parser.add_argument("texts", help="a file of JSON lines")
parser.add_argument("--tp", type=int, default=1, help="ranks that share each weight")
parser.add_argument("--pp", type=int, default=1, help="pipeline stages")
parser.add_argument("--out", default="adapter")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--simulate", action="store_true")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
base = AutoModelForCausalLM.from_pretrained(args.model)
adapter = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
model = get_peft_model(base, adapter)

optimizer = functools.partial(torch.optim.AdamW, lr=1e-3)
engine = adx.train(model, tp=args.tp, pp=args.pp, optimizer=optimizer, max_grad_norm=1.0, simulate=args.simulate)
texts = [json.loads(line)["text"] for line in Path(args.texts).read_text().splitlines()]
for step in range(args.steps):
    chosen = [texts[(4 * step + row) % len(texts)] for row in range(4)]
    batch = tokenizer(chosen, return_tensors="pt", padding=True, truncation=True, return_token_type_ids=False)
    batch["labels"] = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)  # no loss for padding
    result = engine.step(dict(batch))
    if 0 in engine.ranks:
        print(f"step {result.step}: loss {result.loss:.4f}, gradient {result.grad_norm:.3f}", flush=True)
engine.save_pretrained(args.out)  # the adapter, for peft
