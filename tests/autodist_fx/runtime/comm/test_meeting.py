"""Where the ranks meet: threads here, which need no process group for it. What differs is said on all of them."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from autodist_fx.errors import CheckpointError, DisagreementError, RuntimeSetupError
from autodist_fx.runtime.comm.meeting import Place, open_meeting_place
from tests.support.processes import free_port


@pytest.fixture
def port():
    return free_port()


def meet(port, *ranks, seconds=20.0, facts=None, failures=None):
    """Returns what each of the (rank, world size) finds: the meeting's name, or an error; and the seconds that it
    took."""

    stores = []  # until all have read what is there

    def one(place):
        rank, size = place
        began = time.monotonic()
        try:
            found = open_meeting_place(Place(rank, size, rank, "127.0.0.1", port), timedelta(seconds=seconds))
            stores.append(found)
            told = (facts or {}).get(rank, {})
            answer = found.meet(told, seconds, (failures or {}).get(rank))
        except Exception as error:
            answer = error
        return answer, time.monotonic() - began

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def test_all_come(port):
    assert [answer for answer, _ in meet(port, (0, 2), (1, 2))] == ["meeting1", "meeting1"]


def test_a_rank_that_came_twice_is_refused(port):
    found = [answer for answer, _ in meet(port, (0, 3), (1, 3), (1, 3), (2, 3))]
    refused = [str(answer) for answer in found if isinstance(answer, RuntimeSetupError)]
    assert len(refused) == 1 and f"another rank 1 has come to 127.0.0.1:{port} already" in refused[0]


def test_missing_ranks_are_named(port):
    [(error, _)] = meet(port, (0, 3), seconds=1)
    assert f"ranks 1, 2 did not come to 127.0.0.1:{port} within 1 s" in str(error)


def test_ranks_of_two_worlds(port):
    for error, seconds in meet(port, (0, 2), (1, 3)):
        assert isinstance(error, DisagreementError) and seconds < 5
        assert "world size is 2 on rank 0, and 3 on rank 1" in str(error)


def test_facts_that_differ_are_named_with_all_values_on_all_ranks(port):
    facts = {0: {"mesh": "tp=4, pp=1"}, 1: {"mesh": "tp=2, pp=2"}, 2: {"mesh": "tp=4, pp=1"}, 3: {"mesh": "tp=1, pp=4"}}
    found = meet(port, (0, 4), (1, 4), (2, 4), (3, 4), facts=facts)
    assert {str(error) for error, _ in found} == {
        "the ranks do not agree: mesh is tp=4, pp=1 on ranks 0, 2, and tp=2, pp=2 on rank 1, and tp=1, pp=4 on rank 3: "
        "start all ranks with the same arguments and versions"
    }
    assert max(seconds for _, seconds in found) < 5


def test_two_that_differ_are_named_before_the_third_has_come(port):
    for error, seconds in meet(port, (0, 3), (2, 3), facts={0: {"dtype": "float32"}, 2: {"dtype": "bfloat16"}}):
        assert "dtype is float32 on rank 0, and bfloat16 on rank 2" in str(error) and seconds < 5


def test_an_error_of_one_rank_is_raised_on_all(port):
    for error, seconds in meet(port, (0, 3), (1, 3), (2, 3), failures={1: CheckpointError("no such file")}):
        assert type(error) is CheckpointError and str(error) == "no such file" and seconds < 5


def test_further_meetings_of_the_same_ranks(port):
    places = [open_meeting_place(Place(r, 2, r, "127.0.0.1", port), timedelta(seconds=20)) for r in range(2)]

    def differ(place):
        with pytest.raises(DisagreementError, match="a is 0 on rank 0, and 1 on rank 1"):
            place.meet({"a": str(place.place.rank)}, 20)
        return place.meet({"a": "b"}, 20)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(differ, places)) == ["meeting2"] * 2
