"""Ranks compare what they are about to do: any difference, and any failure, is one error on all of them."""

from __future__ import annotations

from typing import Any

from autodist_fx.errors import AutodistError, CheckpointError, DisagreementError
from autodist_fx.runtime.comm.agreement import agree, over, together
from autodist_fx.simulation.thread_communicator import ThreadWorld
from cost_model.mesh import Mesh


def on_ranks(ranks: int, work: Any) -> list[Any]:
    """Returns what `work(rank, everyone)` returns or raises, by rank."""

    def run(rank: int, communicator: Any) -> Any:
        try:
            return work(rank, over(communicator, rank, ranks))
        except Exception as error:
            return error

    return ThreadWorld(Mesh(tp=ranks)).run(run)


def test_all_alike() -> None:
    checked = []
    facts = {"plan": "a", "dtype": "float32"}
    found = on_ranks(3, lambda rank, all_: agree(all_, rank, facts, check=lambda: checked.append(rank)))
    assert found == [None] * 3 and checked == [0]


def test_what_differs() -> None:
    def work(rank: int, everyone: Any) -> None:
        agree(everyone, rank, {"plan": "a", "dtype": "float32" if rank != 1 else "bfloat16", "pp": str(rank // 2)})

    for error in on_ranks(4, work):
        assert type(error) is DisagreementError
        assert "dtype is float32 on ranks 0, 2, 3, and bfloat16 on rank 1; " in str(error)
        assert "pp is 0 on ranks 0, 1, and 1 on ranks 2, 3: start all ranks with" in str(error)
        assert "\n" not in str(error)


def test_a_fact_is_compared_among_those_that_state_it() -> None:
    assert on_ranks(3, lambda rank, all_: agree(all_, rank, {f"of {rank // 2}": "a", "x": "y"})) == [None] * 3
    facts = [{"of 0, 1": "a"}, {"of 0, 1": "b"}, {}]
    found = on_ranks(3, lambda rank, all_: agree(all_, rank, facts[rank]))
    assert all("of 0, 1 is a on rank 0, and b on rank 1" in str(error) for error in found)


def test_what_fails_on_one_rank() -> None:
    def work(rank: int) -> tuple[int, dict[str, str]]:
        if rank == 2:
            raise CheckpointError("a file is cut short")
        return rank, {"plan": "a"}

    found = on_ranks(3, lambda rank, all_: together(all_, rank, lambda: work(rank)))
    assert [(type(e), str(e)) for e in found] == [(CheckpointError, "a file is cut short")] * 3


def test_what_the_check_raises() -> None:
    def check(value: int) -> None:
        raise AutodistError(f"{value} is wrong")

    found = on_ranks(2, lambda rank, all_: together(all_, rank, lambda: (rank, {}), check=check))
    assert [str(e) for e in found] == ["0 is wrong"] * 2
    assert all(type(e) is AutodistError for e in found)
