"""TCP connections between rank 0 and every other rank, which no tensor takes: they carry deaths and errors.

Rank 0 listens, and lets in who knows the job's token, which is in the store where the ranks met. Strangers (port
scanners, connections that say nothing) cost nobody a wait: all connections are read at once, each for a bounded time
and a bounded line.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import selectors
import socket
import time
from typing import Protocol

from autodist_fx.errors import RuntimeSetupError

_KEY = "autodist_fx/links"
_HELLO_BYTES = 128  # of the line with which a rank comes in
_HELLO_SECONDS = 5.0  # after which a connection without one is dropped
_MOST_STRANGERS = 256  # connections without a hello at a time; the oldest goes first
# A machine that vanishes closes nothing. The kernel asks the other side after 3 s of silence, every 2 s, and gives up
# after 3 questions; a process that is merely busy, or stopped in a debugger, still has a kernel that answers.
_KEEPALIVE = (("TCP_KEEPIDLE", 3), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3))
_MOST_LINE_BYTES = 1 << 18


class Store(Protocol):
    """The methods of torch.distributed's key-value store that we use."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...


def accept_all(store: Store, world_size: int, master_addr: str, timeout_seconds: float) -> dict[int, socket.socket]:
    """Accept, on rank 0, the connections of ranks 1 to `world_size` - 1; return them by rank.

    Raises RuntimeSetupError for ranks that do not come within `timeout_seconds`, whoever else does.
    """
    address, token = _own_address(master_addr), secrets.token_hex(16)
    peers: dict[int, socket.socket] = {}
    with (
        socket.create_server(("127.0.0.1" if address.startswith("127.") else "", 0), backlog=1024) as listener,
        selectors.DefaultSelector() as selector,
    ):
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ)
        store.set(_KEY, f"{address} {listener.getsockname()[1]} {token}")
        strangers: dict[socket.socket, _Stranger] = {}  # in the order in which they came
        deadline = time.monotonic() + timeout_seconds
        try:
            while len(peers) < world_size - 1:
                if time.monotonic() > deadline:
                    missing = ", ".join(str(r) for r in range(1, world_size) if r not in peers)
                    raise RuntimeSetupError(f"ranks {missing} did not connect to rank 0 within {timeout_seconds:g} s")
                for key, _ in selector.select(timeout=0.2):
                    if key.fileobj is listener:
                        _admit(listener, selector, strangers)
                        continue
                    stranger = strangers[key.fileobj]  # type: ignore[index]
                    if (line := stranger.read()) is None:
                        continue
                    selector.unregister(stranger.peer)
                    del strangers[stranger.peer]
                    rank = _rank_of(line, token, world_size)
                    if rank is None or rank in peers:
                        stranger.peer.close()
                    else:
                        _keep_alive(stranger.peer)
                        peers[rank] = stranger.peer
                _drop_late(selector, strangers)
        except BaseException:
            for peer in peers.values():
                peer.close()
            raise
        finally:
            for peer in strangers:
                peer.close()
    return peers


def connect(store: Store, rank: int, timeout_seconds: float) -> socket.socket:
    """Connect to rank 0, on any other rank. Raises OSError."""
    address, port, token = store.get(_KEY).decode().split()
    hub = socket.create_connection((address, int(port)), timeout=timeout_seconds)
    say(hub, f"{rank} {token}")
    _keep_alive(hub)
    return hub


class _Stranger:
    """A connection that has not said yet who it is."""

    def __init__(self, peer: socket.socket) -> None:
        self.peer, self.line = peer, bytearray()
        self.deadline = time.monotonic() + _HELLO_SECONDS

    def read(self) -> bytes | None:
        """Return its first line; b"" for one that hung up or says too much; None: not there yet."""
        try:
            # not a byte beyond the line, which is the watchdog's to read
            data = self.peer.recv(_HELLO_BYTES, socket.MSG_PEEK)
            end = data.find(b"\n") + 1
            data = self.peer.recv(end or len(data)) if data else b""
        except BlockingIOError:
            return None
        except OSError:
            return b""
        self.line += data
        if not data or len(self.line) > _HELLO_BYTES:
            return b""
        return bytes(self.line) if end else None


def _admit(
    listener: socket.socket, selector: selectors.BaseSelector, strangers: dict[socket.socket, _Stranger]
) -> None:
    try:
        peer, _ = listener.accept()
    except OSError:  # it went away again, or this process has no descriptors left for now
        return
    peer.setblocking(False)
    if len(strangers) >= _MOST_STRANGERS:
        _drop(selector, strangers, next(iter(strangers)))
    strangers[peer] = _Stranger(peer)
    selector.register(peer, selectors.EVENT_READ)


def _drop_late(selector: selectors.BaseSelector, strangers: dict[socket.socket, _Stranger]) -> None:
    now = time.monotonic()
    for peer in [peer for peer, stranger in strangers.items() if stranger.deadline < now]:
        _drop(selector, strangers, peer)


def _drop(
    selector: selectors.BaseSelector, strangers: dict[socket.socket, _Stranger], peer: socket.socket
) -> None:
    selector.unregister(peer)
    del strangers[peer]
    peer.close()


def _rank_of(line: bytes, token: str, world_size: int) -> int | None:
    words = line.decode("ascii", errors="replace").split()
    if len(words) != 2 or not words[0].isdecimal() or not hmac.compare_digest(words[1].encode(), token.encode()):
        return None
    rank = int(words[0])
    return rank if 1 <= rank < world_size else None


def say(peer: socket.socket, line: str) -> None:
    """Send a line, as far as the other side still listens."""
    with contextlib.suppress(OSError):  # who is not there any more need not be told
        peer.sendall(f"{line}\n".encode())


def read_line(peer: socket.socket) -> str:
    """Return the next line, "" when the other side hung up or says too much. Not a byte beyond the line is taken."""
    line = bytearray()
    try:
        while len(line) <= _MOST_LINE_BYTES and (data := peer.recv(4096, socket.MSG_PEEK)):
            end = data.find(b"\n") + 1
            line += peer.recv(end or len(data))
            if end:
                return line[:-1].decode(errors="replace")
    except OSError:
        pass
    return ""


def _own_address(master_addr: str) -> str:
    """Return the address under which the other ranks reach this machine: the one it would use to reach the master."""
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
