"""One rank that computes and talks until one of them does what argv[2] says. `sleeper_worker.py TP WHAT`

WHAT: "talk" (for two minutes), "raise" (rank 1 raises), "exit" (rank 1 exits with 3), "finish" (all end well, one after
the other), "silent" (rank 1 stops talking, without dying), "groups" (generate on two stages, in groups of rows).
"""

import os
import sys
import time

import torch

from autodist_fx.runtime.comm.join_options import JoinOptions
from autodist_fx.runtime.comm.process_group import join
from cost_model.mesh import Mesh

what = sys.argv[2]


def generate_in_groups() -> None:
    """Generate without end."""
    import autodist_fx as adx
    from tests.support.models import padded_batch, tiny_model

    split = adx.compile(tiny_model("gpt2"), pp=2, verify=False).to_distributed(device="cpu", timeout=60, microbatches=2)
    ids, mask = padded_batch(4, 6)
    for turn in range(2000):
        split.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0)
        if not turn:
            print(f"pid {os.getpid()} rank {split.rank}", file=sys.stderr, flush=True)


if what == "groups":
    generate_in_groups()
    sys.exit()
me = join(Mesh(tp=int(sys.argv[1])), JoinOptions(device="cpu", timeout=3 if what == "silent" else 60))
print(f"pid {os.getpid()} rank {me.rank}", file=sys.stderr, flush=True)
ends = time.monotonic() + 120  # in case that nobody does
step = 0
while time.monotonic() < ends:
    step += 1
    me.communicator.all_reduce(torch.ones(64), "tp")
    if step == 20:
        if what == "finish":
            time.sleep(0.3 * me.rank)
            break
        if me.rank == 1 and what == "raise":
            raise ArithmeticError("no such number")
        if me.rank == 1 and what == "exit":
            os._exit(3)
        if me.rank == 1 and what == "silent":
            time.sleep(60)
