"""Choose a mesh for 8 devices: how many ranks should share each weight (tp), and how many stages (pp) should there be?

    python examples/choose_mesh.py Qwen/Qwen2.5-7B-Instruct --hardware h100

It needs the model's config, and neither weights nor devices: all of it is predicted.
"""

import argparse

from transformers import AutoConfig

import autodist_fx as adx

parser = argparse.ArgumentParser()
parser.add_argument("model", help="a directory, or an id on the hub")
parser.add_argument("--devices", type=int, default=8)
parser.add_argument("--hardware", default="h100", help="a100, h100, cpu-gloo or generic")
parser.add_argument("--out", default="plan.json")
args = parser.parse_args()
config = AutoConfig.from_pretrained(args.model)

# One request at a time, and as many tokens a second as can be: two questions, and mostly two answers.
for objective in ("latency", "throughput"):
    choice = adx.choose_mesh(config, args.devices, hardware=args.hardware, objective=objective)
    print(choice, end="\n\n")

# To train it, the same devices may want another mesh still. A step has 64 sequences of 1024 tokens.
training = adx.choose_training(config, args.devices, global_batch=64, sizes={"S": 1024}, hardware=args.hardware)
print(training, end="\n\n")

# The plan of the last choice, for `adx.from_pretrained(..., plan="plan.json")` and `autodist-fx show plan.json`.
choice.best.plan.save(args.out)
print(f"{args.out}: {choice.best.mesh}, {len(choice.best.plan.stages)} stages")
