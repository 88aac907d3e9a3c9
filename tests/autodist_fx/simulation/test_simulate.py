"""The ranks of a mesh as threads: what they compute, and what is said when they do not fit together."""

import pytest
import torch
from torch import nn

from autodist_fx.errors import CommunicationError, DeadlockError
from autodist_fx.simulation.run_ranks import simulate
from autodist_fx.simulation.thread_communicator import ThreadWorld
from cost_model.mesh import Mesh
from passes.ops import comm as comm_ops
from passes.program.rank_program import RankProgram


def run(mesh, work):
    return ThreadWorld(mesh).run(work)


def programs(mesh, build):
    """A RankProgram per rank. `build(graph, x, module, rank)` writes its graph from the input x, returns the output."""
    made = []
    for rank in range(mesh.size):
        module, graph = nn.Module(), torch.fx.Graph()
        output = build(graph, graph.placeholder("x"), module, rank)
        graph.output({} if output is None else {"y": output})
        made.append(RankProgram(rank, mesh, torch.fx.GraphModule(module, graph), ("x",), {}, ()))
    return made


def test_all_reduce_sums_in_rank_order_and_each_rank_owns_its_result():
    shards = [torch.tensor([0.1, 1e8]), torch.tensor([0.2, 1.0]), torch.tensor([0.3, -1e8])]

    def work(rank, comm):
        total = comm.all_reduce(shards[rank], "tp")
        result = total.clone()
        total.add_(rank + 1)  # nobody else may see this
        comm.all_reduce(torch.zeros(1), "tp")
        return result

    results = run(Mesh(tp=3), work)
    assert all(torch.equal(r, (shards[0] + shards[1]) + shards[2]) for r in results)
    assert shards[0].tolist() == torch.tensor([0.1, 1e8]).tolist()


@pytest.mark.parametrize(
    "parts",
    [
        (((0, 4),), ((4, 8),)),
        (((0, 5),), ((5, 8),)),
        (((0, 8),), ()),
        ((), ((0, 8),)),
        (((0, 2), (4, 6)), ((2, 4), (6, 8))),  # each half of a fused gate|up
        (((0, 8),), ((0, 8),)),  # replicated
        (((0, 4),), ((0, 4),), ((4, 8),), ((4, 8),)),  # one KV head on two ranks each
        (((2, 8),), ((0, 4),)),
    ],
)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_all_gather(parts, dim):
    whole = torch.arange(8 * 8 * 8).reshape(8, 8, 8)

    def work(rank, comm):
        held = [torch.arange(start, stop) for start, stop in parts[rank]]
        index = torch.cat(held) if held else torch.empty(0, dtype=torch.long)
        return comm.all_gather(whole.index_select(dim, index), "tp", dim, parts)

    assert all(torch.equal(result, whole) for result in run(Mesh(tp=len(parts)), work))


def test_all_gather_takes_the_first_owners_values():
    parts = (((0, 2),), ((1, 3),))
    results = run(Mesh(tp=2), lambda rank, comm: comm.all_gather(torch.full((2,), rank), "tp", 0, parts))
    assert [r.tolist() for r in results] == [[0, 0, 1]] * 2


def test_all_gather_refuses_a_gap_and_a_shard_of_another_size():
    with pytest.raises(CommunicationError, match="no rank holds element 2"):
        run(Mesh(tp=2), lambda rank, comm: comm.all_gather(torch.zeros(2), "tp", 0, (((0, 2),), ((3, 5),))))
    with pytest.raises(CommunicationError, match=r"tp rank 0 holds 3 elements .* shape \[2\]"):
        run(Mesh(tp=2), lambda rank, comm: comm.all_gather(torch.zeros(2), "tp", 0, (((0, 3),), ((3, 5),))))


def test_send_and_recv_by_channel():
    def work(rank, comm):
        if rank == 0:
            for channel, value in ((1, 10.0), (2, 20.0), (1, 11.0)):
                comm.send(torch.full((2,), value), to=1, channel=channel)
            return None
        return [comm.recv((2,), torch.float32, "cpu", source=0, channel=c)[0].item() for c in (2, 1, 1)]

    assert run(Mesh(pp=2), work) == [None, [20.0, 10.0, 11.0]]


def test_recv_refuses_another_shape():
    def work(rank, comm):
        if rank == 0:
            comm.send(torch.zeros(2, 3), to=1, channel=0)
        else:
            comm.recv((2, 4), torch.float32, "cpu", source=0, channel=0)

    with pytest.raises(CommunicationError, match=r"expects float32\[2, 4\].*was sent float32\[2, 3\]"):
        run(Mesh(pp=2), work)


def test_a_tensor_that_nobody_receives():
    def work(rank, comm):
        if rank == 0:
            comm.send(torch.zeros(2), to=1, channel=7)

    with pytest.raises(CommunicationError, match=r"rank 0 sent float32\[2\] to rank 1 on channel 7"):
        run(Mesh(pp=2), work)


def test_deadlock_names_what_every_rank_waits_for():
    def work(rank, comm):
        if rank == 0:
            comm.recv((2,), torch.float32, "cpu", source=2, channel=4)
        elif rank == 2:
            comm.all_reduce(torch.zeros(3), "tp")

    with pytest.raises(DeadlockError) as caught:
        run(Mesh(tp=2, pp=2), work)
    message = str(caught.value)
    assert "rank 0 (stage 0, tp rank 0) waits for float32[2] from rank 2 on channel 4" in message
    assert "rank 1 (stage 0, tp rank 1) has finished" in message
    assert "rank 2 (stage 1, tp rank 0) waits for ranks [3] in all_reduce of float32[3]" in message


def test_collectives_that_do_not_match():
    def work(rank, comm):
        comm.all_reduce(torch.zeros(2 + rank), "tp")

    with pytest.raises(CommunicationError, match=r"rank 0 calls all_reduce of float32\[2\], and rank 1 .*\[3\]"):
        run(Mesh(tp=2), work)


def test_a_ranks_own_exception_reaches_the_caller():
    class Odd(Exception):
        pass

    def work(rank, comm):
        comm.all_reduce(torch.zeros(2), "tp")
        if rank == 1:
            raise Odd("the cause")
        try:
            comm.all_reduce(torch.zeros(2), "tp")
        except Exception:
            pytest.fail("a rank must not be able to swallow the end")

    with pytest.raises(Odd, match="the cause") as caught:
        run(Mesh(tp=3), work)
    assert caught.value.__notes__ == ["raised on rank 1 (stage 0, tp rank 1)"]


def test_the_callers_grad_mode_holds_in_the_ranks():
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            assert run(Mesh(tp=2), lambda rank, comm: torch.is_grad_enabled()) == [enabled] * 2


def test_tensor_parallel_linear_pair_equals_the_whole():
    up, down, x = (torch.randn(s, dtype=torch.float64) for s in ((6, 4), (4, 6), (3, 4)))
    rows = ((0, 4), (4, 6))

    def build(graph, x, module, rank):
        start, stop = rows[rank]
        module.up, module.down = nn.Parameter(up[start:stop]), nn.Parameter(down[:, start:stop])
        hidden = graph.call_function(nn.functional.linear, (x, graph.get_attr("up")))
        hidden = graph.call_function(nn.functional.relu, (hidden,))
        owed = graph.call_function(nn.functional.linear, (hidden, graph.get_attr("down")))
        return graph.call_function(comm_ops.all_reduce, (owed, "tp"))

    outputs = simulate(programs(Mesh(tp=2), build), [{"x": x, "unused": 1}] * 2)
    expected = nn.functional.linear(nn.functional.relu(nn.functional.linear(x, up)), down)
    assert all(torch.allclose(o["y"], expected, rtol=1e-12) for o in outputs)


def test_pipeline_of_two_stages_equals_the_whole():
    x = torch.randn(3, 4)

    def build(graph, x, module, rank):
        if rank == 0:
            graph.call_function(comm_ops.send, (graph.call_function(torch.exp, (x,)), 1, 3))
            return None
        rows = graph.call_method("size", (x, 0))
        received = graph.call_function(comm_ops.recv, ((rows, 4), torch.float32, "cpu", 0, 3))
        return graph.call_function(torch.sin, (received,))

    outputs = simulate(programs(Mesh(pp=2), build), [{"x": x}] * 2)
    assert outputs[0] == {} and torch.equal(outputs[1]["y"], x.exp().sin())
