"""Hardware of one rank: FLOP/s, bytes/s, bytes of memory, fixed costs. Presets by name; every constant has a source.

FLOP/s and bandwidths of presets are what programs reach, not what the datasheet says: datasheet peak x the fraction
given beside it. Of a machine that `autodist-fx measure` measured they are peaks, and tables say how near an op or a
message of some size comes to them (its utilisation, which is 1 for a preset).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cost_model.costs.measured import BoundOf, Measured
from cost_model.costs.tables import Bound, Sizes, Table
from cost_model.errors import PlanError
from cost_model.mesh import Mesh

GB = 1e9  # as datasheets count bandwidth
GIB = 1024**3
MICROSECOND = 1e-6


@dataclass(frozen=True, slots=True)
class Link:
    """A link between ranks: a message takes `launch + steps * latency + bytes / bandwidth` (communication.py)."""

    latency_seconds: float  # per step of a collective's algorithm, and per send
    bandwidth: float  # bytes/s per rank and direction
    launch_seconds: float = 0.0  # per collective or send, whatever its number of steps
    tree: bool = True  # small messages may take log2(ranks) steps instead of the ring's; Gloo only has the ring
    # Measured seconds by (ranks, bytes), of the kinds all_reduce, all_gather and send: the formula is then the bound.
    tables: tuple[Table, ...] = ()

    def utilisation(self, kind: str, sizes: Sizes, bound: Bound) -> float:
        """Returns the share of what the formula promises that a message reaches; 1.0 where that was not measured.

        sizes: (ranks, bytes); `bound` gives the formula's seconds for such sizes.
        """
        table = next((t for t in self.tables if t.kind == kind), None)
        return 1.0 if table is None else table.utilisation(sizes, bound)


@dataclass(frozen=True, slots=True)
class Hardware:
    """One rank's compute and memory, and its links to the others."""

    name: str
    flops: tuple[tuple[str, float], ...]  # (dtype, FLOP/s that a large matmul reaches)
    memory_bandwidth: float  # bytes/s that a large elementwise op reaches, reads and writes together
    memory_bytes: int
    op_seconds: float  # fixed cost of an op that computes: dispatch and launch (see dispatches_ahead)
    view_seconds: float  # fixed cost of an op that only changes shape or strides
    tp_link: Link
    pp_link: Link
    ranks_per_node: int
    inter_node: Link
    dispatches_ahead: bool = False  # a host dispatches while the device computes: an op takes the longer of both
    fuses_norms: bool = True  # rms_norm is one kernel: its backward pass needs what it read, and no more
    ranks_share_device: bool = False  # ranks are threads of one CPU: a process alone would have all of it
    measured: Measured | None = None  # how near ops come to these rates; None: they reach them, whatever their size
    busy: int = 1  # ranks of this machine that compute at once
    threads: int = 1  # that share the work of one op, each at these rates
    speed: float = 1.0  # share of what was measured that a rank gets

    def fixed_seconds(self, kinds: Sequence[str], dtype: str) -> float:
        """Returns the fixed cost of an op of the first of `kinds` that was measured."""
        if self.measured is None:
            return self.op_seconds
        return self.measured.fixed_seconds(kinds, dtype, self.busy) / self.speed

    def utilisation(self, kinds: Sequence[str], dtype: str, sizes: Sizes, bound_of: BoundOf) -> float:
        """Returns the share of the peak rates that an op reaches; 1.0 where that was not measured.

        kinds: the op's, then those that stand for it; `bound_of` says for a table what these rates allow.
        """
        if self.measured is None:
            return 1.0
        return self.measured.utilisation(kinds, dtype, sizes, bound_of, self.busy) * self.threads * self.speed

    def stream_seconds(self, nbytes: float, kind: str = "add") -> float:
        """Returns the seconds to read and write so many bytes in all, as an op of some kind does on large tensors."""
        if nbytes <= 0:
            return 0.0
        bandwidth = self.memory_bandwidth
        share = self.utilisation((kind, "add"), "float32", (nbytes,), lambda _: lambda sizes: sizes[0] / bandwidth)
        return nbytes / bandwidth / share

    def computing(self, ranks: int) -> Hardware:
        """Returns this hardware while `ranks` ranks of the machine compute at once; a preset is meant for that."""
        if self.measured is None:
            return self
        found = replace(self, busy=ranks)
        op, view = (found.fixed_seconds((kind,), "float32") for kind in ("add", "view"))
        return replace(found, op_seconds=op, view_seconds=view)

    def at_share(self, share: float) -> Hardware:
        """Returns this hardware where a rank has a share of its speed only, above 0: half of a core, say, the other
        half of which somebody else has. Links stay as they are."""
        if self.measured is not None:
            return replace(self, speed=self.speed * share).computing(self.busy)
        return replace(
            self,
            flops=tuple((dtype, rate * share) for dtype, rate in self.flops),
            memory_bandwidth=self.memory_bandwidth * share,
            op_seconds=self.op_seconds / share,
            view_seconds=self.view_seconds / share,
        )

    def flops_of(self, dtype: str) -> float:
        """Returns the FLOP/s for a dtype; a dtype that is not listed runs at float32's rate."""
        table = dict(self.flops)
        return table.get(dtype, table["float32"])

    def tp_link_on(self, mesh: Mesh) -> Link:
        """Returns the link that a tp group's collectives run over, the slowest in the group."""
        # Rank = stage * tp + tp_rank: a group lies inside one node only if groups tile the nodes without overlap.
        same_node = mesh.size <= self.ranks_per_node or (
            mesh.tp <= self.ranks_per_node and self.ranks_per_node % mesh.tp == 0
        )
        return self.tp_link if same_node else self.inter_node

    def dp_link_on(self, mesh: Mesh) -> Link:
        """Returns the link that the sums over replicas run over, the slowest in a dp group."""
        # A stage's replicas are neighbours: dp * tp ranks, which lie inside one node as a tp group does.
        stage = mesh.dp * mesh.tp
        same_node = mesh.size <= self.ranks_per_node or (
            stage <= self.ranks_per_node and self.ranks_per_node % stage == 0
        )
        return self.pp_link if same_node else self.inter_node

    def hop_link(self, mesh: Mesh, source: int, target: int) -> Link:
        """Returns the link between two stages: `inter_node` if any pair of ranks (same tp rank) lies on two nodes."""
        same_node = all(
            mesh.rank(source, t) // self.ranks_per_node == mesh.rank(target, t) // self.ranks_per_node
            for t in range(mesh.tp)
        )
        return self.pp_link if same_node else self.inter_node

    def alone(self, ranks: int) -> Hardware:
        """Returns the device that the unsplit model would run on: this one, or the whole CPU if `ranks` ranks share it.

        One core for each rank is assumed: with more ranks than cores, all ranks are slower than predicted.
        """
        if not self.ranks_share_device or ranks == 1:
            return self.computing(1)
        if self.measured is not None:
            return replace(self.computing(ranks), threads=ranks, memory_bytes=self.memory_bytes * ranks)
        return replace(
            self,
            flops=tuple((dtype, rate * ranks) for dtype, rate in self.flops),
            memory_bandwidth=self.memory_bandwidth * ranks,
            memory_bytes=self.memory_bytes * ranks,
        )


# Measured by hand, before there were tables: 2 ranks x 1 thread at once, torch 2.13.0, Gloo on loopback, a virtual
# machine with 2 cores of an AMD EPYC (Zen 4). Each line says what was measured.
CPU_GLOO = Hardware(
    name="cpu-gloo",
    flops=(
        ("float32", 90e9),  # linear 512x768x2048 float32: 89.7 GFLOP/s
        ("float64", 45e9),  # float64: 27.7 to 45.8
        ("bfloat16", 190e9),  # bfloat16 (avx512_bf16): 183 to 199
        ("float16", 16e9),  # float16: 10.2 to 18.9, there are no instructions for it
    ),
    memory_bandwidth=20 * GB,  # streaming add: 25.2; reading a 256 MiB weight for one token: 19.0
    memory_bytes=8 * GIB,  # a round number; users who know their machine give max_memory
    op_seconds=5 * MICROSECOND,  # add 1.1 us, silu 1.3, linear 2.5, busy 4.3, 4.4, 5.0; and Python that calls them
    view_seconds=2 * MICROSECOND,  # view 0.5 us, transpose 0.6, busy 1.7 and 1.3; and Python
    # Ranks of one machine exchange through shared memory (autodist_fx/runtime/comm/shared_memory.py), 2 ranks:
    # all_reduce of 3 KB 9.8 us, 64 KB 20, 1 MiB 184, 16 MiB 2320; all_gather 14, 19, 119, 3370.
    # Gloo: 135, 445, 403, 8065 and more.
    tp_link=Link(2 * MICROSECOND, 5 * GB, 6 * MICROSECOND),
    # send of 3 KB, half of there and back: 69 us, busy 146; of 16 MiB: 2.7 GB/s.
    pp_link=Link(latency_seconds=100 * MICROSECOND, bandwidth=2.7 * GB, tree=False),
    ranks_per_node=64,  # loopback: however many are started
    inter_node=Link(latency_seconds=300 * MICROSECOND, bandwidth=1.1 * GB, tree=False),  # TCP over 10 Gbit Ethernet
    fuses_norms=False,  # torch 2.13 composes rms_norm, and keeps what is normalized, too
    ranks_share_device=True,
)

# Large matmuls reach about 80 to 87 % of NVIDIA's dense peak (S. Bekman, "Machine Learning Engineering Open Book",
# compute/accelerator, maximum achievable matmul FLOPS); inside a model, with smaller shapes, less: 70 % here.
MATMUL_FRACTION = 0.70
# Copies on HBM reach about 90 % of the datasheet (BabelStream on A100: 1.8 of 2.04 TB/s); short ops less: 80 % here.
HBM_FRACTION = 0.80
# NCCL's own tuning model (src/graph/tuning.cc, baseLatencies and hwLatencies), ring with the LL protocol: 6.6 us, plus
# 0.6 us a step over NVLink or 2.7 us over the network; on top, the kernel's launch (about 5 us).
NCCL_LAUNCH = 12 * MICROSECOND
NCCL_NVLINK_STEP = 0.6 * MICROSECOND
NCCL_NETWORK_STEP = 2.7 * MICROSECOND
# Eager PyTorch dispatches an op from Python in about 5 us (the device waits for it when ops are short), a view in 2.
EAGER_OP = 5 * MICROSECOND
EAGER_VIEW = 2 * MICROSECOND

A100 = Hardware(  # NVIDIA A100 80GB SXM datasheet (nvidia-a100-datasheet, 2021)
    name="a100",
    flops=(
        ("float32", 19.5e12 * MATMUL_FRACTION),  # without TF32, which PyTorch leaves off for matmuls
        ("float64", 19.5e12 * MATMUL_FRACTION),  # tensor cores
        ("bfloat16", 312e12 * MATMUL_FRACTION),
        ("float16", 312e12 * MATMUL_FRACTION),
        ("int8", 624e12 * MATMUL_FRACTION),
    ),
    memory_bandwidth=2039 * GB * HBM_FRACTION,
    memory_bytes=80 * 10**9,
    op_seconds=EAGER_OP,
    view_seconds=EAGER_VIEW,
    # NVLink 3: 600 GB/s both ways, so 300 each way; nccl-tests' all_reduce bus bandwidth on 8 GPUs is about 230.
    tp_link=Link(NCCL_NVLINK_STEP, 230 * GB, NCCL_LAUNCH),
    pp_link=Link(NCCL_NVLINK_STEP, 230 * GB, NCCL_LAUNCH),
    ranks_per_node=8,  # DGX A100
    dispatches_ahead=True,
    inter_node=Link(NCCL_NETWORK_STEP, 200e9 / 8 * 0.9, NCCL_LAUNCH),  # one HDR InfiniBand port a GPU: 200 Gbit/s
)

H100 = Hardware(  # NVIDIA H100 SXM datasheet (dense rates: half of those it gives with sparsity)
    name="h100",
    flops=(
        ("float32", 67e12 * MATMUL_FRACTION),
        ("float64", 67e12 * MATMUL_FRACTION),
        ("bfloat16", 989e12 * MATMUL_FRACTION),
        ("float16", 989e12 * MATMUL_FRACTION),
        ("int8", 1979e12 * MATMUL_FRACTION),
        ("float8_e4m3fn", 1979e12 * MATMUL_FRACTION),
        ("float8_e5m2", 1979e12 * MATMUL_FRACTION),
    ),
    memory_bandwidth=3350 * GB * HBM_FRACTION,
    memory_bytes=80 * 10**9,
    op_seconds=EAGER_OP,
    view_seconds=EAGER_VIEW,
    # NVLink 4: 900 GB/s both ways, so 450 each way; bus bandwidth of a ring on 8 GPUs is about 80 % of it.
    tp_link=Link(NCCL_NVLINK_STEP, 360 * GB, NCCL_LAUNCH),
    pp_link=Link(NCCL_NVLINK_STEP, 360 * GB, NCCL_LAUNCH),
    ranks_per_node=8,  # DGX H100
    dispatches_ahead=True,
    inter_node=Link(NCCL_NETWORK_STEP, 400e9 / 8 * 0.9, NCCL_LAUNCH),  # one NDR InfiniBand port a GPU: 400 Gbit/s
)

GENERIC = Hardware(  # no product: round numbers of a current accelerator, for a layout that suits most
    name="generic",
    flops=(("float32", 50e12), ("float64", 10e12), ("bfloat16", 200e12), ("float16", 200e12)),
    memory_bandwidth=1500 * GB,
    memory_bytes=64 * 10**9,
    op_seconds=EAGER_OP,
    view_seconds=EAGER_VIEW,
    tp_link=Link(1 * MICROSECOND, 150 * GB, NCCL_LAUNCH),
    pp_link=Link(1 * MICROSECOND, 150 * GB, NCCL_LAUNCH),
    ranks_per_node=8,
    dispatches_ahead=True,
    inter_node=Link(3 * MICROSECOND, 20 * GB, NCCL_LAUNCH),
)

PRESETS = {preset.name: preset for preset in (CPU_GLOO, A100, H100, GENERIC)}


MEASURED = "measured-"  # what names of measured machines begin with, then the kind of device


def shares_cpu(name: str) -> bool:
    """Returns whether ranks on the hardware of this name are threads of one CPU."""
    return name.startswith(f"{MEASURED}cpu-") or (name in PRESETS and PRESETS[name].ranks_share_device)


def hardware(name: str | Hardware) -> Hardware:
    """Returns the preset of a name; a Hardware is passed through. Raises PlanError naming the presets for any other."""
    if isinstance(name, Hardware):
        return name
    if name not in PRESETS:
        raise PlanError(f"no hardware preset named {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
