"""Connections to rank 0: who knows the token comes in, whoever else knocks."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from autodist_fx.errors import RuntimeSetupError
from autodist_fx.runtime.comm.links import accept_all, connect, read_line, say


class Store(dict):
    set = dict.__setitem__

    def get(self, key):
        while key not in self:
            time.sleep(0.01)
        return self[key].encode()


def knock(store, *lines):
    """A stranger's connection, which has said `lines` and nothing else."""
    address, port, token = store.get("autodist_fx/links").decode().split()
    peer = socket.create_connection((address, int(port)))
    for line in lines:
        peer.sendall(line.replace("TOKEN", token).encode())
    return peer


def test_half_open_connections_delay_nobody():
    store, size = Store(), 4
    with ThreadPoolExecutor(8) as pool:
        hub = pool.submit(accept_all, store, size, "127.0.0.1", 20)
        strangers = [knock(store) for _ in range(40)]
        strangers += [knock(store, "GET / HTTP/1.0\r\n"), knock(store, "x" * 5000), knock(store, "1 ", "half")]
        strangers += [knock(store, f"{rank} TOKEN\n") for rank in ("0", "4", "-1", "x", "1 1", "")]
        strangers += [knock(store, "1 0123456789abcdef0123456789abcdef\n")]
        began = time.monotonic()
        peers = list(pool.map(lambda rank: connect(store, rank, 20), range(1, size)))
        found = hub.result(20)
        assert time.monotonic() - began < 2
        assert sorted(found) == [1, 2, 3]
        for rank, peer in enumerate(peers, 1):  # each at its end, and nothing lost of what was said after the hello
            say(peer, f"I am {rank}")
            assert read_line(found[rank]) == f"I am {rank}"
    for peer in (*strangers, *peers, *found.values()):
        peer.close()


def test_what_follows_the_hello_in_one_packet_is_kept():
    store = Store()
    with ThreadPoolExecutor(1) as pool:
        hub = pool.submit(accept_all, store, 2, "127.0.0.1", 20)
        peer = knock(store, "1 TOKEN\nbye\n")
        assert read_line(hub.result(20)[1]) == "bye"
    peer.close()


def test_a_rank_comes_in_once():
    store = Store()
    with ThreadPoolExecutor(1) as pool:
        hub = pool.submit(accept_all, store, 3, "127.0.0.1", 20)
        first = connect(store, 1, 20)
        time.sleep(0.1)
        again = connect(store, 1, 20)
        assert read_line(again) == ""  # hung up
        second = connect(store, 2, 20)
        found = hub.result(20)
        say(first, "first")
        assert read_line(found[1]) == "first"
    for peer in (first, again, second, *found.values()):
        peer.close()


def test_missing_ranks_are_named_among_strangers():
    store = Store()
    with ThreadPoolExecutor(1) as pool:
        hub = pool.submit(accept_all, store, 4, "127.0.0.1", 1)
        peers = [connect(store, 2, 20), *(knock(store) for _ in range(300))]
        with pytest.raises(RuntimeSetupError, match="ranks 1, 3 did not connect to rank 0 within 1 s"):
            hub.result(20)
    for peer in peers:
        peer.close()


def test_a_line_without_an_end_is_cut():
    here, there = socket.socketpair()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(here.sendall, b"x" * (3 << 19))
        pool.submit(here.close)
        assert read_line(there) == ""
        there.close()
