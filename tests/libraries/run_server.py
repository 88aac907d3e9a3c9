"""The server of examples/server over a model that is split: `make libraries`; fastapi and uvicorn are needed.

200 requests of 8 clients at tp=2, whose tokens are compared with one process's; bad requests among them, which are
refused; then a rank is killed while all clients wait: each gets an error in good order, and after the restart the
requests are answered again. Each line is a check; the exit code is 1 where one fails.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.checkpoint import save_tiny
from tests.support.processes import ENV, free_port

FRONT_END = Path(__file__).resolve().parents[2] / "examples" / "server" / "front_end.py"
REQUESTS, CLIENTS, SECONDS = 200, 8, 300
BAD = (
    {"prompt": "w5", "options": {"temperature": -1.0, "do_sample": True}},
    {"prompt": "w5", "options": {"nonsense": 1}},
)


def asked(number: int) -> dict[str, Any]:
    """Returns request `number`: a prompt of 1 to 9 words, and 1 to 7 tokens to generate."""
    words = [f"w{3 + (7 * number + n) % 90}" for n in range(1 + number % 9)]
    options: dict[str, Any] = {"max_new_tokens": 1 + number % 7, "do_sample": False}
    return {"prompt": " ".join(words), "options": options}


def answer(port: int, request: Any) -> tuple[int, list[dict[str, Any]]]:
    """Returns (status, lines) of one request; status 0 for a connection that breaks off."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        body = request if isinstance(request, str) else json.dumps(request)
        connection.request("POST", "/generate", body, {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, [json.loads(line) for line in response.read().splitlines()]
    except (OSError, http.client.HTTPException):
        return 0, []
    finally:
        connection.close()


@contextlib.contextmanager
def serving(directory: Path, log: Path) -> Iterator[int]:
    """Starts the server at tp=2; yields its port when it answers."""
    port = free_port()
    command = [sys.executable, str(FRONT_END), str(directory), "--tp", "2", "--port", str(port)]
    with log.open("w") as said:
        server = subprocess.Popen(command, env=ENV, stdout=said, stderr=said)
        try:
            until(lambda: "the ranks are ready" in log.read_text(), server)
            yield port
        finally:
            server.terminate()
            server.wait(60)


def until(done: Any, server: Any = None) -> None:
    """Waits until `done()`. Raises TimeoutError when that takes too long, or `server` has ended."""
    end = time.monotonic() + SECONDS
    while not done():
        if time.monotonic() > end or (server is not None and server.poll() is not None):
            raise TimeoutError("what is waited for does not come")
        time.sleep(0.2)


def ranks_of(directory: Path) -> list[int]:
    """Returns the process ids of the ranks, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (path / "cmdline").read_bytes().split(b"\0")
            is_rank = any(a.endswith(b"rank.py") for a in arguments[:3]) and str(directory).encode() in arguments
            if is_rank:
                environment = dict(e.partition(b"=")[::2] for e in (path / "environ").read_bytes().split(b"\0"))
                found[int(environment[b"RANK"])] = int(path.name)
    return [found[rank] for rank in sorted(found)]


def check(claim: str, is_right: bool, said: object = "") -> bool:
    print(f"{'right' if is_right else 'WRONG'}  {claim} {said}", flush=True)
    return is_right


def main() -> int:
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        directory, log = save_tiny(Path(folder) / "model", "llama", num_hidden_layers=2), Path(folder) / "log"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)

        def alone(request: dict[str, Any]) -> list[int]:
            tokens = tokenizer(request["prompt"], return_tensors="pt", return_token_type_ids=False)
            with torch.no_grad():
                output = model.generate(**tokens, **request["options"])
            return output[0, tokens.input_ids.shape[1] :].tolist()

        requests = [asked(number) for number in range(REQUESTS)]
        wanted = [alone(request) for request in requests]
        with serving(directory, log) as port, ThreadPoolExecutor(CLIENTS) as clients:
            right = [all_answered(clients, port, requests, wanted, tokenizer)]
            right.append(bad_ones(clients, port, requests, wanted))
            right.append(a_rank_dies(clients, port, directory, log, requests, wanted))
        until(lambda: not ranks_of(directory))
        right.append(check("the ranks end with the front end", True))
        if not all(right):
            print(log.read_text()[-3000:])
    return 0 if all(right) else 1


def all_answered(clients: Any, port: int, requests: list[Any], wanted: list[Any], tokenizer: Any) -> bool:
    """Asks all requests, from all clients at once."""
    started = time.monotonic()
    answers = list(clients.map(lambda request: answer(port, request), requests))
    seconds = time.monotonic() - started
    tokens = [lines[-1].get("tokens") if lines else None for _, lines in answers]
    texts = ["".join(line.get("text", "") for line in lines) for _, lines in answers]
    same_text = [tokenizer.decode(t, skip_special_tokens=True).split() for t in wanted] == [t.split() for t in texts]
    pieces = sum(len(lines) - 1 for _, lines in answers)
    said = f"({seconds:.1f} s, {pieces} pieces of text)"
    same = check(f"{REQUESTS} requests of {CLIENTS} clients at tp=2: the tokens of one process", tokens == wanted, said)
    return check("what was streamed is their text", same_text) and same


def bad_ones(clients: Any, port: int, requests: list[Any], wanted: list[Any]) -> bool:
    """Asks bad requests between good ones."""
    mixed = [BAD[0], requests[3], BAD[1], "no json", {"options": {}}, requests[4], {"prompt": ""}]
    answers = list(clients.map(lambda request: answer(port, request), mixed))
    statuses = [status for status, _ in answers]
    good = [answers[i][1][-1].get("tokens") for i in (1, 5)] == [wanted[3], wanted[4]]
    for i in (0, 2):
        print(f"       {answers[i][1][0]}")
    refused = statuses[:6] == [400, 200, 400, 422, 422, 200]
    return check("bad requests are refused, those beside them answered", good and refused, statuses)


def a_rank_dies(
    clients: Any, port: int, directory: Path, log: Path, requests: list[Any], wanted: list[Any]
) -> bool:
    """Kills rank 1 while every client waits; then asks again."""
    long = {"prompt": "w5 w6", "options": {"max_new_tokens": 60, "min_new_tokens": 60, "do_sample": False}}
    waiting = [clients.submit(answer, port, long) for _ in range(CLIENTS)]
    time.sleep(0.3)
    started = time.monotonic()
    os.kill(ranks_of(directory)[1], signal.SIGKILL)
    answers = [each.result() for each in waiting]
    seconds = time.monotonic() - started
    ends = Counter((status, "".join(lines[-1]) if lines else "broken off") for status, lines in answers)
    in_order = {(503, "detail"), (200, "errorstatus"), (200, "tokens")}  # refused, broken off in its stream, answered
    clean = set(ends) <= in_order and ends[503, "detail"] >= CLIENTS - 3
    said = f"after {seconds:.1f} s: {dict(ends)}"
    right = check(f"rank 1 is killed: {CLIENTS} clients get an error in good order", clean, said)
    print(f"       {next(lines[-1] for status, lines in answers if status == 503)}")
    until(lambda: log.read_text().count("the ranks are ready") == 2)
    seconds = time.monotonic() - started
    again = list(clients.map(lambda request: answer(port, request), requests[:16]))
    same = [lines[-1].get("tokens") for _, lines in again] == wanted[:16]
    said = f"({seconds:.1f} s after the kill)"
    return check("after the restart the tokens are those of one process", same, said) and right


if __name__ == "__main__":
    sys.exit(main())
