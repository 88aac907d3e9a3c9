"""One rank of the server. The front end starts it under torchrun: rank.py MODEL TP PP.

A request is one call of all ranks. So each loops on the same small exchange: rank 0 reads the next request and tells it
to the others; then all generate, and rank 0 says what comes of it.
"""

import json
import os
import select
import socket
import sys

import torch
import torch.distributed as dist
from transformers import AutoTokenizer, TextStreamer

import autodist_fx as adx

IDLE_SECONDS = 60  # so often rank 0 speaks up: the others wait for it with a time limit


def told_by_rank_0(text: str) -> str:
    """Return rank 0's text on every rank: its length crosses first, then its bytes."""
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    size = torch.tensor([len(data)])
    if dist.is_initialized():  # else this rank is alone
        dist.broadcast(size, 0)
        data = data if dist.get_rank() == 0 else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, 0)
    return bytes(data.tolist()).decode()


model = adx.from_pretrained(sys.argv[1], tp=int(sys.argv[2]), pp=int(sys.argv[3]))
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
front_end = socket.create_connection(("127.0.0.1", int(os.environ["FRONT_END"]))) if model.rank == 0 else None
lines = front_end.makefile() if front_end else None


def say(line: dict) -> None:
    front_end.sendall(json.dumps(line).encode() + b"\n")


while True:
    is_idle = front_end and not select.select([front_end], [], [], IDLE_SECONDS)[0]
    text = told_by_rank_0("null" if is_idle else lines.readline() if lines else "")
    if not text:  # the front end has hung up
        break
    if (request := json.loads(text)) is None:
        continue
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if front_end else None
    if streamer:
        streamer.on_finalized_text = lambda piece, stream_end=False: say({"text": piece})
    try:
        tokens = tokenizer(request["prompt"], return_tensors="pt", return_token_type_ids=False).to(model.device)
        output = model.generate(**tokens, streamer=streamer, **request["options"])
        last = {"tokens": output[0, tokens.input_ids.shape[1] :].tolist()}
    except Exception as error:  # a bad request: all ranks raise it, and the next one works
        last = {"error": f"{type(error).__name__}: {error}", "status": 400}
    say(last) if front_end else None
