"""A rank that dies takes the others with it, with a message that names it, instead of leaving them waiting.

Every rank holds a TCP connection to rank 0. The kernel closes a dead process's connections at once, so rank 0 sees any
rank's death, and everyone sees rank 0's; rank 0 tells the others. A thread listens, and ends the process even while the
main thread is inside a Gloo or NCCL call that never returns. Who finishes in good order says so first.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import threading
import time
from typing import NoReturn, Protocol

from autodist_fx.errors import RuntimeSetupError

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h

_KEY = "autodist_fx/watchdog"
# A machine that vanishes closes nothing. The kernel asks the other side after 3 s of silence, every 2 s, and gives up
# after 3 questions; a process that is merely busy, or stopped in a debugger, still has a kernel that answers.
_KEEPALIVE = (("TCP_KEEPIDLE", 3), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3))
_EXPLAIN_SECONDS = 5.0  # how long a failed wait gives us to find out who died


class Store(Protocol):
    """What we use of torch.distributed's key-value store."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...


class Watchdog:
    """Watches from `start` until `close`. One per process."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._peers: dict[int, socket.socket] = {}  # on rank 0: by rank; elsewhere: rank 0 alone
        self._listener: socket.socket | None = None
        self._closing = False
        self._lock = threading.Lock()

    def start(self, store: Store, master_addr: str, timeout_seconds: float) -> None:
        """Connect every rank to rank 0. Returns when all are connected; raises RuntimeSetupError when they do not."""
        if self.world_size == 1:
            return
        try:
            if self.rank == 0:
                self._listen(store, master_addr, timeout_seconds)
            else:
                self._connect(store, timeout_seconds)
        except OSError as error:
            raise RuntimeSetupError(
                f"rank {self.rank}: the watchdog's connections to rank 0 could not be made: {error}"
            ) from error
        os.register_at_fork(after_in_child=self._drop)  # a child must not keep the connection of a dead parent open
        watch = self._watch_all if self.rank == 0 else self._watch_rank_0
        threading.Thread(target=watch, name="autodist_fx watchdog", daemon=True).start()

    def explain(self) -> None:
        """To be called when talking to a peer failed: gives a death the time to be noticed, which ends this process."""
        if self._peers and not self._closing:
            time.sleep(_EXPLAIN_SECONDS)

    def close(self, failure: str | None = None) -> None:
        """Say goodbye, or, with `failure`, that this rank failed and why, which ends the others."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        word = "bye" if failure is None else f"dead {self.rank} failed: {_one_line(failure)}"
        for peer in self._peers.values():
            _say(peer, word)
        self._drop()

    def _listen(self, store: Store, master_addr: str, timeout_seconds: float) -> None:
        address = _own_address(master_addr)
        self._listener = socket.create_server(("127.0.0.1" if address.startswith("127.") else "", 0))
        self._listener.settimeout(timeout_seconds)
        token = secrets.token_hex(8)
        store.set(_KEY, f"{address} {self._listener.getsockname()[1]} {token}")
        while len(self._peers) < self.world_size - 1:
            try:
                peer, _ = self._listener.accept()
            except TimeoutError:
                missing = sorted(set(range(1, self.world_size)) - set(self._peers))
                raise RuntimeSetupError(f"ranks {missing} did not join within {timeout_seconds:g} s") from None
            peer.settimeout(timeout_seconds)
            words = _read_line(peer).split()
            if len(words) == 2 and words[1] == token:
                _keep_alive(peer)
                self._peers[int(words[0])] = peer
            else:
                peer.close()
        self._listener.close()

    def _connect(self, store: Store, timeout_seconds: float) -> None:
        address, port, token = store.get(_KEY).decode().split()
        hub = socket.create_connection((address, int(port)), timeout=timeout_seconds)
        _say(hub, f"{self.rank} {token}")
        _keep_alive(hub)
        self._peers[0] = hub

    def _watch_all(self) -> None:
        """Rank 0: whoever hangs up without a goodbye is dead."""
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while selector.get_map() and not self._closing:
                for key, _ in selector.select(timeout=1.0):
                    line = _read_line(self._peers[key.data])
                    if line == "bye":
                        selector.unregister(key.fileobj)
                        continue
                    if self._closing:
                        return
                    dead, reason = _parse_death(line, key.data)
                    for rank, peer in self._peers.items():
                        if rank != dead:
                            _say(peer, f"dead {dead} {reason}")
                    self._die(dead, reason)

    def _watch_rank_0(self) -> None:
        line = _read_line(self._peers[0])
        if line != "bye" and not self._closing:
            self._die(*_parse_death(line, 0))

    def _die(self, dead: int, reason: str) -> NoReturn:
        message = f"autodist_fx: rank {dead} {reason}; rank {self.rank} ends with it\n"
        with contextlib.suppress(OSError):  # not print: the main thread may hold stderr's lock
            os.write(2, message.encode())
        os._exit(EXIT_CODE)

    def _drop(self) -> None:
        for peer in (*self._peers.values(), *([self._listener] if self._listener else [])):
            with contextlib.suppress(OSError):
                peer.close()


def _parse_death(line: str, sender: int) -> tuple[int, str]:
    """(rank, what happened to it) from "dead <rank> <what>", or from a hang-up of `sender`."""
    words = line.split(" ", 2)
    if len(words) == 3 and words[0] == "dead":
        return int(words[1]), words[2]
    return sender, "died without a word (killed, out of memory, or crashed)"


def _own_address(master_addr: str) -> str:
    """The address under which the other ranks reach this machine: the one it would use to reach the master."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((master_addr, 9))  # sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostbyname(socket.gethostname())


def _keep_alive(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _say(peer: socket.socket, line: str) -> None:
    with contextlib.suppress(OSError):  # who is not there any more need not be told
        peer.sendall(f"{line}\n".encode())


def _read_line(peer: socket.socket) -> str:
    """The next line, "" when the other side hung up. Reads byte by byte: lines are few and short."""
    line = bytearray()
    try:
        while (byte := peer.recv(1)) not in (b"", b"\n"):
            line += byte
        return line.decode(errors="replace") if byte else ""
    except OSError:
        return ""


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]
