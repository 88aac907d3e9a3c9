"""Keeps the ranks running: starts them under torchrun, hands them one request after the other, starts them again.

Rank 0 connects to a port of the front end. A request is a JSON line to it; its answer comes back as JSON lines, of
which the last has no "text". When the ranks die, whoever waits for an answer is told so.
"""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

DIED = {"error": "the model's ranks died and are being started again: ask once more", "status": 503}


async def keep_ranks(arguments: list[str], count: int, waiting: asyncio.Queue) -> None:
    """Run rank.py with these arguments in `count` processes, for ever. `waiting` has (request, queue for its lines)."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    while True:
        connected: asyncio.Queue = asyncio.Queue()
        port = await asyncio.start_server(lambda *ends, to=connected: to.put_nowait(ends), "127.0.0.1", limit=2**24)
        ranks = await asyncio.create_subprocess_exec(
            *torchrun, str(Path(__file__).with_name("rank.py")), *arguments,
            env={**os.environ, "FRONT_END": str(port.sockets[0].getsockname()[1])},
        )  # fmt: skip
        ended, lines = asyncio.create_task(ranks.wait()), asyncio.Queue()
        with contextlib.suppress(OSError, EOFError):
            reader, writer = await first_of(connected.get(), ended)
            print("the ranks are ready", file=sys.stderr, flush=True)
            while True:
                request, lines = await first_of(waiting.get(), ended)
                writer.write(request.encode() + b"\n")
                line = {"text": ""}
                while "text" in line:
                    line = json.loads(await reader.readuntil())  # an EOFError when rank 0 is gone
                    lines.put_nowait(line)
        port.close()
        for answer in [lines, *(waiting.get_nowait()[1] for _ in range(waiting.qsize()))]:
            answer.put_nowait(DIED)
        print(f"the ranks ended with exit code {await ended}; starting them again", file=sys.stderr, flush=True)
        await asyncio.sleep(1)


async def first_of(wanted: Awaitable[Any], ended: asyncio.Task) -> Any:
    """Return what `wanted` gives. Raises EOFError where the ranks end before."""
    task = asyncio.ensure_future(wanted)
    await asyncio.wait({task, ended}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        raise EOFError
    return task.result()
