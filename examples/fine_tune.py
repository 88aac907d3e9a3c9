"""Fine-tune a model with transformers' Trainer, split over ranks: adx.Trainer takes its place, and the mesh.

    torchrun --nproc-per-node 2 examples/fine_tune.py HuggingFaceTB/SmolLM2-135M texts.jsonl --tp 2 --out tuned

texts.jsonl has a line {"text": ...} for each text. With --simulate all ranks are in this one process, to try it out.
"""

import argparse
import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, TrainingArguments

import autodist_fx as adx

parser = argparse.ArgumentParser()
parser.add_argument("model", help="a directory, or an id on the hub")
parser.add_argument("texts", help="a file of JSON lines")
parser.add_argument("--tp", type=int, default=1, help="ranks that share each weight")
parser.add_argument("--pp", type=int, default=1, help="pipeline stages")
parser.add_argument("--out", default="tuned")
parser.add_argument("--max-steps", type=int, default=100)
parser.add_argument("--simulate", action="store_true")
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model)
tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
texts = [json.loads(line)["text"] for line in Path(args.texts).read_text().splitlines()]
rows = [{"input_ids": tokenizer(text, truncation=True, max_length=512).input_ids} for text in texts]

trainer = adx.Trainer(
    model,
    TrainingArguments(
        args.out,
        per_device_train_batch_size=4,
        learning_rate=5e-5,
        max_steps=args.max_steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=rows,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    processing_class=tokenizer,
    tp=args.tp,
    pp=args.pp,
    simulate=args.simulate,
)
trainer.train()
trainer.save_model(args.out)  # for from_pretrained, transformers' or ours
