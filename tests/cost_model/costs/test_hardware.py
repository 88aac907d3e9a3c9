"""Presets are whole and in proportion; links follow from where ranks lie."""

import pytest

from cost_model.costs.hardware import A100, CPU_GLOO, H100, PRESETS, hardware
from cost_model.errors import PlanError
from cost_model.mesh import Mesh


def test_presets_by_name():
    assert {"cpu-gloo", "a100", "h100", "generic"} <= set(PRESETS)
    assert hardware("a100") is A100
    assert hardware(H100) is H100


def test_an_unknown_preset_is_an_error_that_lists_the_presets():
    with pytest.raises(PlanError, match=r"no hardware preset named 'h1000'; there are cpu-gloo, a100, h100, generic"):
        hardware("h1000")


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
def test_constants_are_positive(preset):
    assert all(rate > 0 for _, rate in preset.flops)
    assert preset.flops_of("float32") == dict(preset.flops)["float32"]
    assert preset.flops_of("int64") == preset.flops_of("float32")
    for number in (preset.memory_bandwidth, preset.memory_bytes, preset.op_seconds, preset.ranks_per_node):
        assert number > 0
    for link in (preset.tp_link, preset.pp_link, preset.inter_node):
        assert link.latency_seconds > 0
        assert link.bandwidth > 0
    assert preset.inter_node.bandwidth <= preset.tp_link.bandwidth


def test_rates_stay_below_the_datasheet():
    assert A100.flops_of("bfloat16") < 312e12 < H100.flops_of("bfloat16") < 989e12
    assert A100.memory_bandwidth < 2039e9 < H100.memory_bandwidth < 3350e9


def test_a_tp_group_across_nodes_pays_the_network():
    assert H100.tp_link_on(Mesh(tp=8, pp=4)) is H100.tp_link  # a group a node
    assert H100.tp_link_on(Mesh(tp=16)) is H100.inter_node
    assert H100.tp_link_on(Mesh(tp=3, pp=2)) is H100.tp_link  # six ranks, one node
    assert H100.tp_link_on(Mesh(tp=3, pp=3)) is H100.inter_node  # ranks 6, 7 | 8


def test_hops_across_nodes_pay_the_network():
    mesh = Mesh(tp=4, pp=4)  # nodes hold stages 0-1 and 2-3
    assert H100.hop_link(mesh, 0, 1) is H100.pp_link
    assert H100.hop_link(mesh, 1, 2) is H100.inter_node
    assert H100.hop_link(mesh, 0, 3) is H100.inter_node
    assert H100.hop_link(Mesh(tp=8, pp=4), 0, 1) is H100.inter_node


def test_a_process_alone_has_the_whole_cpu_but_one_gpu():
    assert H100.alone(8) is H100
    alone = CPU_GLOO.alone(4)
    assert alone.flops_of("float32") == 4 * CPU_GLOO.flops_of("float32")
    assert alone.memory_bandwidth == 4 * CPU_GLOO.memory_bandwidth
    assert CPU_GLOO.alone(1) is CPU_GLOO
