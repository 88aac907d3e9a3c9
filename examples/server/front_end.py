"""Serve a split model over HTTP: the front end. It starts the ranks (rank.py), and starts them again when they die.

    python examples/server/front_end.py Qwen/Qwen2.5-0.5B-Instruct --tp 2 --port 8000
    curl -N localhost:8000/generate --json '{"prompt": "Hello", "options": {"max_new_tokens": 16, "do_sample": false}}'

An answer is a stream of JSON lines: {"text": ...} for each piece, at last {"tokens": [...]} or {"error": ...}. Requests
wait in one queue. A bad request gets status 400, and dead ranks mean 503. It needs fastapi and uvicorn.
"""

import argparse
import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from keeper import keep_ranks
from pydantic import BaseModel

parser = argparse.ArgumentParser()
parser.add_argument("model")
for name, default in (("tp", 1), ("pp", 1), ("port", 8000)):
    parser.add_argument(f"--{name}", type=int, default=default)
args = parser.parse_args()
waiting: asyncio.Queue = asyncio.Queue()  # (request, queue of its answer's lines), in the order of arrival


class Request(BaseModel):
    prompt: str
    options: dict[str, float | int | bool | str] = {}  # of transformers' generate


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    keeper = asyncio.create_task(keep_ranks([args.model, str(args.tp), str(args.pp)], args.tp * args.pp, waiting))
    yield
    keeper.cancel()


async def stream(line: dict, lines: asyncio.Queue) -> AsyncIterator[str]:
    yield json.dumps(line) + "\n"
    while "text" in line:
        yield json.dumps(line := await lines.get()) + "\n"


async def generate(request: Request) -> StreamingResponse:
    lines: asyncio.Queue = asyncio.Queue()
    waiting.put_nowait((request.model_dump_json(), lines))
    first = await lines.get()
    if "error" in first:
        raise HTTPException(first["status"], first["error"])
    return StreamingResponse(stream(first, lines), media_type="application/x-ndjson")


app = FastAPI(lifespan=lifespan)
app.post("/generate")(generate)
uvicorn.run(app, port=args.port, log_level="warning")
