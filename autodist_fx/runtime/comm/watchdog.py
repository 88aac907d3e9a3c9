"""Watches the other ranks: one that dies ends all, with a message that names it; an error of a call is told to all.

Every rank holds a TCP connection to rank 0 (links.py). The kernel closes a dead process's connections at once, so rank
0 sees any rank's death, and everyone sees rank 0's; rank 0 tells the others. A thread listens, and ends the process
even while the main thread is inside a Gloo or NCCL call that never returns. Who finishes in good order says so first.

The same connections carry incidents: an error that a rank raised in a call of all ranks. The first one of an epoch (of
a communicator, between two of its repairs) counts; rank 0 says it to everyone, and each rank's thread breaks off what
its main thread waits for.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
from collections.abc import Callable
from typing import NoReturn

from autodist_fx.errors import RuntimeSetupError
from autodist_fx.runtime.comm.links import Store, accept_all, connect, read_line, say
from autodist_fx.runtime.comm.remote_error import ErrorReport

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h

_SAID = "has-said-why"  # in place of a reason
_EXPLAIN_SECONDS = 5.0  # how long a failed wait gives us to find out who died or failed


class Watchdog:
    """Watches the other ranks from `start` until `close`. One per process.

    `fatal`: the death of another rank ends this process. Where the process group is the user's own, it is not.
    """

    def __init__(self, rank: int, world_size: int, *, fatal: bool = True) -> None:
        self.rank, self.world_size, self._fatal = rank, world_size, fatal
        self._peers: dict[int, socket.socket] = {}  # on rank 0: by rank; elsewhere: rank 0 alone
        self._closing = False
        self._lock = threading.Lock()
        self._speaking = threading.Lock()  # two threads' lines must not mix
        self._breaking = threading.Lock()  # held while waits are broken off
        self._left: set[int] = set()  # ranks that have ended in good order
        self._incidents: dict[str, ErrorReport] = {}  # by epoch, until the next one of the same communicator
        self._told = threading.Condition()
        self._breakers: dict[str, Callable[[ErrorReport], None]] = {}

    def start(self, store: Store, master_addr: str, timeout_seconds: float) -> None:
        """Connect every rank to rank 0. Returns when all are connected; raises RuntimeSetupError when they are not."""
        if self.world_size == 1:
            return
        try:
            if self.rank == 0:
                self._peers = accept_all(store, self.world_size, master_addr, timeout_seconds)
            else:
                self._peers = {0: connect(store, self.rank, timeout_seconds)}
        except OSError as error:
            raise RuntimeSetupError(
                f"rank {self.rank}: the watchdog's connections to rank 0 could not be made: {error}"
            ) from error
        os.register_at_fork(after_in_child=self._drop)  # a child must not keep the connection of a dead parent open
        watch = self._watch_all if self.rank == 0 else self._watch_rank_0
        threading.Thread(target=watch, name="autodist_fx watchdog", daemon=True).start()

    # ------------------------------------------------------------------------------------------------- incidents

    def watch(self, epoch: str, break_off: Callable[[ErrorReport], None]) -> None:
        """Call `break_off(report)`, in another thread, when a rank reports an incident of `epoch`: at once, if one
        has already. No other epoch is watched from now on of those that the same communicator had before."""
        with self._told:
            scope = epoch.partition("/")[0]
            for old in [e for e in (*self._breakers, *self._incidents) if e.partition("/")[0] == scope and e != epoch]:
                self._breakers.pop(old, None)
                self._incidents.pop(old, None)
            self._breakers[epoch] = break_off
            known = self._incidents.get(epoch)
        if known is not None:
            break_off(known)

    def report(self, epoch: str, report: ErrorReport) -> ErrorReport:
        """Tell all ranks of an error; return the incident that counts for `epoch`, which may be another rank's."""
        if self.rank == 0:
            self._incident(epoch, report)
        elif self._peers:
            self._say(self._peers[0], f"incident {epoch} {report.to_text()}")
        return self.incident(epoch, _EXPLAIN_SECONDS) or report

    def incident(self, epoch: str, seconds: float = 0.0) -> ErrorReport | None:
        """Return what failed in `epoch`, given `seconds` to hear of it; None: nothing."""
        with self._told:
            self._told.wait_for(lambda: epoch in self._incidents or not self._peers, seconds)
            return self._incidents.get(epoch)

    def explain(self, epoch: str) -> ErrorReport | None:
        """Give a death, which ends this process, an incident or a goodbye the time to be noticed; called when talking
        to a peer failed."""
        if not self._peers or self._closing:
            return None
        with self._told:
            self._told.wait_for(lambda: epoch in self._incidents or self._left, _EXPLAIN_SECONDS)
            return self._incidents.get(epoch)

    def has_left(self, rank: int) -> bool:
        """Return whether a rank has ended in good order: it will not send anything any more."""
        return rank in self._left

    def _hear_goodbye(self, rank: int) -> None:
        with self._told:
            self._left.add(rank)
            self._told.notify_all()

    def _incident(self, epoch: str, report: ErrorReport) -> None:
        """Return, on rank 0, whose word decides, the first incident of an epoch."""
        with self._told:
            first = self._incidents.setdefault(epoch, report) is report
        if first:
            for peer in self._peers.values():
                self._say(peer, f"incident {epoch} {report.to_text()}")
            self._hear_incident(epoch, report)

    def _hear_incident(self, epoch: str, report: ErrorReport) -> None:
        with self._told:
            self._incidents.setdefault(epoch, report)
            break_off = self._breakers.get(epoch)
            self._told.notify_all()
        with self._breaking:
            if break_off is not None and not self._closing:
                break_off(report)

    def _heard_incident(self, line: str) -> tuple[str, ErrorReport] | None:
        words = line.split(" ", 2)
        if len(words) != 3 or words[0] != "incident":
            return None
        try:
            return words[1], ErrorReport.from_text(words[2])
        except (ValueError, KeyError, TypeError):
            return None

    # ---------------------------------------------------------------------------------------------------- deaths

    def close(self, failure: str | None = None, *, is_said: bool = False) -> None:
        """Say goodbye, or, with `failure`, that this rank failed and why, which ends the others: without a word where
        it `is_said` already on a stderr that is theirs, too."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        with self._breaking:  # torch aborts a process that ends while a thread of it is inside of Gloo
            pass
        word = "bye" if failure is None else f"dead {self.rank} failed: {_one_line(failure)}"
        word = f"dead {self.rank} {_SAID}" if failure is not None and is_said else word
        for peer in self._peers.values():
            self._say(peer, word)
        self._drop()

    def _watch_all(self) -> None:
        """Watch all connections, on rank 0: whoever hangs up without a goodbye is dead."""
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while selector.get_map() and not self._closing:
                for key, _ in selector.select(timeout=1.0):
                    line = read_line(self._peers[key.data])
                    if (heard := self._heard_incident(line)) is not None:
                        self._incident(*heard)
                        continue
                    if line == "bye" or not self._fatal:
                        selector.unregister(key.fileobj)
                        self._hear_goodbye(key.data)
                        for rank, peer in self._peers.items():
                            if rank not in self._left:
                                self._say(peer, f"left {key.data}")
                        continue
                    if self._closing:
                        return
                    dead, reason = _parse_death(line, key.data)
                    for rank, peer in self._peers.items():
                        if rank != dead:
                            self._say(peer, f"dead {dead} {reason}")
                    self._die(dead, reason)

    def _watch_rank_0(self) -> None:
        while True:
            line = read_line(self._peers[0])
            kind, _, rest = line.partition(" ")
            if (heard := self._heard_incident(line)) is not None:
                self._hear_incident(*heard)
            elif kind == "left" and rest.isdecimal():
                self._hear_goodbye(int(rest))
            else:
                break
        if line != "bye" and not self._closing and self._fatal:
            self._die(*_parse_death(line, 0))
        self._hear_goodbye(0)

    def _say(self, peer: socket.socket, line: str) -> None:
        with self._speaking:
            say(peer, line)

    def _die(self, dead: int, reason: str) -> NoReturn:
        message = f"autodist_fx: rank {dead} {reason}; rank {self.rank} ends with it\n"
        with contextlib.suppress(OSError):  # not print: the main thread may hold stderr's lock
            os.write(2, message.encode() if reason != _SAID else b"")
        os._exit(EXIT_CODE)

    def _drop(self) -> None:
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.close()


def _parse_death(line: str, sender: int) -> tuple[int, str]:
    """Return (rank, what happened to it) from "dead <rank> <what>", or from a hang-up of `sender`."""
    words = line.split(" ", 2)
    if len(words) == 3 and words[0] == "dead" and words[1].isdecimal():
        return int(words[1]), words[2]
    return sender, "died without a word (killed, out of memory, or crashed)"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]
