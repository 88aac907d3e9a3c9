"""Where the ranks meet: threads here, which need no process group for it."""

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from autodist_fx.errors import RuntimeSetupError
from autodist_fx.runtime.comm.process_group import Place, _meeting_place


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def meet(port, *ranks, seconds=20.0):
    """What each of the (rank, world size) finds: a store, or an error."""

    def one(place):
        try:
            return _meeting_place(Place(*place, place[0], "127.0.0.1", port), timedelta(seconds=seconds))
        except RuntimeSetupError as error:
            return str(error)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def test_all_come(port):
    first, second = meet(port, (0, 2), (1, 2))
    first.set("word", "said")
    assert second.get("word") == b"said"


def test_a_rank_that_came_twice_is_refused(port):
    found = meet(port, (0, 3), (1, 3), (1, 3), (2, 3))
    refused = [answer for answer in found if isinstance(answer, str)]
    assert len(refused) == 1 and f"another rank 1 has come to 127.0.0.1:{port} already" in refused[0]


def test_who_did_not_come_is_named(port):
    assert f"ranks 1, 2 did not come to 127.0.0.1:{port} within 1 s" in meet(port, (0, 3), seconds=1)[0]


def test_ranks_of_two_worlds(port):
    assert "rank 1 is one of 3, and rank 0 one of 2" in meet(port, (0, 2), (1, 3))[1]
