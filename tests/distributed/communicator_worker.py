"""One rank: what a communicator does over Gloo, against the same on plain tensors. `communicator_worker.py TP PP`"""

import sys

import torch

from autodist_fx.runtime.comm.dist_communicator import EXCHANGE_BYTES
from autodist_fx.runtime.comm.gather import CHUNK_BYTES, CHUNKED_BYTES
from autodist_fx.runtime.comm.join_options import JoinOptions
from autodist_fx.runtime.comm.process_group import join, leave
from cost_model.mesh import Mesh

mesh = Mesh(tp=int(sys.argv[1]), pp=int(sys.argv[2]))
me = join(mesh, JoinOptions(device="cpu", timeout=60))
comm, rank = me.communicator, me.rank
stage, tp_rank = mesh.coordinates(rank)


def of_rank(r, *shape, dtype=torch.float32):
    """The same everywhere."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 * stage + r)).to(dtype)


def check_all_reduce(shape, dtype):
    shards = [of_rank(r, *shape, dtype=dtype) for r in range(mesh.tp)]
    expected = shards[0]
    for shard in shards[1:]:
        expected = expected + shard
    mine = shards[tp_rank].clone()
    assert torch.allclose(comm.all_reduce(mine, "tp"), expected, atol=5e-2 if dtype is torch.bfloat16 else 1e-5)


shared = comm.shared
slot_bytes = shared and shared.slot_bytes
assert (shared is None) == (mesh.tp == 1)
# Through shared memory, in one piece and in several; by exchange over sockets; by Gloo's ring.
for way in ("shared", "pieces", "exchange", "ring"):
    comm.shared = shared if way in ("shared", "pieces") else None
    if shared is not None:
        shared.slot_bytes = 1000 if way == "pieces" else slot_bytes
    comm.exchange_bytes = 0 if way == "ring" else EXCHANGE_BYTES
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for shape in ((1, 1, 768), (3, 5), (0, 4), (300, 1000)):
            check_all_reduce(shape, dtype)
    transposed = of_rank(tp_rank, 4, 6).t()
    assert torch.allclose(comm.all_reduce(transposed, "tp"), sum(of_rank(r, 4, 6).t() for r in range(mesh.tp)))

size = 12
splits = {
    "even": tuple(((r * size // mesh.tp, (r + 1) * size // mesh.tp),) for r in range(mesh.tp)),
    "uneven": (
        ((0, size - mesh.tp + 1),),
        *(((size - mesh.tp + r, size - mesh.tp + r + 1),) for r in range(1, mesh.tp)),
    ),
    "one holds all": (((0, size),), *[()] * (mesh.tp - 1)),
    "every one holds all": (((0, size),),) * mesh.tp,
    "woven": tuple(tuple((i, i + 1) for i in range(r, size, mesh.tp)) for r in range(mesh.tp)),
}
# Through shared memory, in one piece and in several; small and large ones over sockets, and as over NCCL.
for way in ("shared", "pieces", "rows", "whole", "chunks", "padded"):
    comm.shared = shared if way in ("shared", "pieces", "rows") else None
    if shared is not None:
        shared.slot_bytes = {"pieces": 40, "rows": 1000}.get(way, slot_bytes)
    comm.exchanges = way != "padded"
    comm.chunked_bytes, comm.chunk_bytes = (1, 300) if way == "chunks" else (CHUNKED_BYTES, CHUNK_BYTES)
    for name, parts in splits.items():
        for dim in (0, 1, -1):
            whole = of_rank(0, size, size, size)
            held = torch.cat([torch.arange(start, stop) for start, stop in parts[tp_rank]] or [torch.empty(0)]).long()
            result = comm.all_gather(whole.index_select(dim, held), "tp", dim, parts)
            assert torch.equal(result, whole), (name, dim)
comm.exchanges = True
comm.shared = shared

# Around the ring of all ranks, many at once: nobody may block in send, whoever receives first.
to, source = (rank + 1) % mesh.size, (rank - 1) % mesh.size
for channel in (3, 4):
    for i in range(20):
        comm.send(torch.full((50_000,), rank * 1000 + channel * 100 + i), to, channel)
comm.send(torch.empty(0, 3), to, 5)
for channel in (4, 3):
    for i in range(20):
        x = comm.recv((50_000,), torch.long, "cpu", source, channel)
        assert (x == source * 1000 + channel * 100 + i).all()
assert comm.recv((0, 3), torch.float32, "cpu", source, 5).shape == (0, 3)
comm.finish_sends()
assert comm.unfinished_sends == 0
leave()
if rank == 0:
    print("all well")
