"""Evaluate a split model with lm-eval (pip install lm_eval): the harness sees a model of transformers, and never ranks.

    torchrun --nproc-per-node 2 examples/evaluate.py Qwen/Qwen2.5-0.5B-Instruct --tp 2 --tasks arc_easy --limit 100

Every rank runs the harness alike, since each forward pass is one call of all ranks; rank 0 prints.
"""

import argparse

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from transformers import AutoTokenizer

import autodist_fx as adx

parser = argparse.ArgumentParser()
parser.add_argument("model", help="a directory, or an id on the hub")
parser.add_argument("--tp", type=int, default=1)
parser.add_argument("--pp", type=int, default=1)
parser.add_argument("--tasks", default="arc_easy", help="lm-eval's names, with commas between them")
parser.add_argument("--include-path", help="a directory with tasks of your own")
parser.add_argument("--limit", type=int, help="so many examples of each task alone")
args = parser.parse_args()

model = adx.from_pretrained(args.model, tp=args.tp, pp=args.pp)
tokenizer = AutoTokenizer.from_pretrained(args.model)
harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device=str(model.device))
results = simple_evaluate(
    harness,
    tasks=args.tasks.split(","),
    limit=args.limit,
    task_manager=TaskManager(include_path=args.include_path),
)
if model.rank == 0:
    print(make_table(results))
