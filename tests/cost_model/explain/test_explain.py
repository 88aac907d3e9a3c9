"""A printed plan has the numbers that are in it, in 120 columns, with 80 layers as short as four."""

from dataclasses import replace

import pytest

from cost_model.explain.plan_text import plan_text
from cost_model.format import bytes_text, compress_names, count_text, seconds_text
from cost_model.graph.placement import REPLICATE, Layout
from cost_model.plan.warnings import plan_warnings, whole_device
from cost_model.plan.weights import sharded_share, whole_param_bytes
from cost_model.text_tables import table
from tests.support.plans.examples import large_plan, small_plan


def row(text, start):
    """The cells of the line that starts with `start`."""
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return [cell for cell in line.split("  ") if cell]


def test_the_whole_text():
    assert plan_text(small_plan()) == EXPECTED


EXPECTED = """\
LlamaForCausalLM on tp=2 x pp=2 (4 ranks of cpu-gloo), objective default
38 M parameters, 72.6 MiB; 25 ops; predicted at B=4, S=128, T=128; graph 0123456789ab

Stages, one forward, each on its slowest tp rank
stage  ranks  layers            compute     comm  FLOPs  weights       KV   activ.     work    total  recomputes
-----  -----  ----------------  -------  -------  -----  -------  -------  -------  -------  -------  ----------
0      0-1    model.layers.0-1  12.3 ms  4.20 ms  1.5 G  120 MiB  1.5 MiB  6.0 MiB  1.0 MiB  128 MiB           -
1      2-3    model.layers.2-3  13.3 ms  4.20 ms  1.5 G  120 MiB  1.5 MiB  6.0 MiB  1.0 MiB  128 MiB        1 op

Linears and embeddings
module                           role    times  weight     on each tp rank
-------------------------------  ------  -----  ---------  ---------------
model.embed_tokens               vocab      x1  49152x576  24576x576
model.layers.*.self_attn.q_proj  column     x4  576x576    [384|192]x576
model.layers.*.self_attn.o_proj  row        x4  576x576    576x[384|192]
model.layers.*.mlp.up_proj       column     x4  1536x576   768x576
model.layers.*.mlp.down_proj     row        x4  576x1536   576x768
lm_head                          vocab      x1  49152x576  24576x576

Collectives in one forward, bytes of whole tensors
stage             collective  times     bytes
----------------  ----------  -----  --------
stages 0-1, each  all_reduce      4   2.2 MiB
stages 0-1, each  all_gather      1  48.0 MiB
all stages        all_reduce      8   4.5 MiB
all stages        all_gather      2  96.0 MiB

Sent between stages, bytes from one tp rank
0 -> 1  add_1 (576 KiB)

Parameters
                                      whole   sharded  replicated  share sharded
---------------------------------  --------  --------  ----------  -------------
weights of matmuls and embeddings  72.6 MiB  72.6 MiB         0 B         100.0%
norms, biases and others            4.5 KiB       0 B     4.5 KiB           0.0%
held by several stages: model.embed_tokens.weight (stages 0-1)

Prediction
one forward 34.0 ms (compute 25.6 ms, communication 8.40 ms), 25% of it communication
one device  50.0 ms with 4 cores: predicted speed-up 1.47 on 4 ranks
slowest stage 1 with 17.5 ms: what bounds a pipeline kept full, 1.9x the pace of one microbatch at a time
fullest stage 0 with 128 MiB of 8.0 GiB a device"""


def test_eighty_layers_print_like_four():
    small, large = plan_text(small_plan()), plan_text(large_plan(8000))
    assert len(large.splitlines()) <= len(small.splitlines()) + 10
    assert max(map(len, large.splitlines())) <= 120
    assert row(large, "model.layers.*.mlp.up_proj")[2].strip() == "x80"
    assert "model.layers.20-39" in large


@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (1, 4), (3, 2), (8, 16)])
def test_any_mesh_prints(mesh):
    text = plan_text(small_plan(32, *mesh))
    assert max(map(len, text.splitlines())) <= 120
    assert ("Sent between stages" in text) == (mesh[1] > 1)


def test_long_names_and_many_layers_of_many_kinds_stay_in_the_width():
    plan = small_plan(80, 2, 1)
    layers = tuple(
        f"a_rather_long_model_name.decoder.blocks.{i}.{'attention' if i % 3 else 'mamba'}" for i in range(80)
    )
    ops = tuple(replace(op, module=f"an_outer_wrapper.with_a_long_name.{op.module}" * 2) for op in plan.ops)
    text = plan_text(replace(plan, ops=ops, stages=(replace(plan.stages[0], layers=layers),), warnings=("w " * 200,)))
    assert max(map(len, text.splitlines())) <= 120


def test_layers_treated_differently_are_told_apart():
    plan = small_plan(6, 2, 1)
    ops = tuple(
        replace(op, role="replicate", weight="") if op.module == "model.layers.3.mlp.up_proj" else op for op in plan.ops
    )
    text = plan_text(replace(plan, ops=ops))
    assert row(text, "model.layers.3.mlp.up_proj")[1].strip() == "replicate"
    assert row(text, "model.layers.0-2,4-5.mlp.up_proj")[2].strip() == "x5"


def test_a_weight_is_found_by_its_module_where_the_plan_does_not_name_it():
    plan = small_plan()
    text = plan_text(replace(plan, ops=tuple(replace(op, weight="") for op in plan.ops)))
    assert row(text, "model.layers.*.mlp.down_proj")[-1].strip() == "576x768"
    assert row(text, "lm_head")[-1].strip() == "S(0) 24576"  # tied: no parameter of that name, but a layout


# --- warnings --------------------------------------------------------------------------------------------------------


def test_no_warnings_without_a_reason():
    assert plan_warnings(small_plan()) == []
    assert "Warnings" not in plan_text(small_plan())


def test_slower_than_one_device_is_said():
    plan = replace(small_plan(), one_device_seconds=0.017)
    (warning,) = plan_warnings(plan)
    assert warning == (
        "the split is predicted slower than one device: 34.0 ms a forward on 4 ranks against 17.0 ms on one with 4 "
        "cores (2.00 times as long); split for memory, or use fewer ranks"
    )
    assert "! the split is predicted slower than one device" in plan_text(plan)
    assert plan_warnings(replace(small_plan(2, 1, 1), one_device_seconds=1e-6)) == []  # it is one device


def test_slower_but_one_device_does_not_hold_the_model():
    plan = replace(small_plan(), one_device_seconds=0.017, device_memory_bytes=2**26)
    assert any("one device does not hold the model" in w for w in plan_warnings(plan))


def test_what_does_not_fit_is_said():
    (warning,) = plan_warnings(replace(small_plan(), device_memory_bytes=100 * 2**20))
    assert warning.startswith("stages 0-1 do not fit: they need up to 128 MiB on a rank, a device has 100 MiB")
    plan = small_plan()
    stages = (plan.stages[0], replace(plan.stages[1], activation_bytes=2**34))
    (warning,) = plan_warnings(replace(plan, stages=stages))
    assert warning.startswith("stage 1 does not fit: it needs 16.1 GiB")


def test_one_device_is_all_cores_only_where_ranks_share_a_cpu():
    assert whole_device(small_plan()) == " with 4 cores"
    assert whole_device(small_plan(2, 1, 1)) == ""
    for hardware in ("h100", "a100, cpu-gloo", "my cluster"):
        plan = replace(small_plan(), hardware=hardware)
        assert whole_device(plan) == "" and "one device  50.0 ms: predicted" in plan_text(plan)


def test_memory_is_that_of_the_stage_s_own_device():
    request = replace(small_plan().request, max_memory=(2**28, 2**26))
    plan = replace(small_plan(), request=request, device_memory_bytes=2**28)
    (warning,) = plan_warnings(plan)
    assert warning.startswith("stage 1 does not fit: it needs") and "a device has 64.0 MiB" in warning
    smaller = replace(request, max_memory=(2**27 + 2**26, 2**30))
    assert "fullest stage 0 with 128 MiB of 192 MiB a device" in plan_text(
        replace(plan, request=smaller, device_memory_bytes=2**30)
    )


def test_a_plan_that_replicates_everything_is_told_so():
    plan = small_plan()
    replicas = tuple(replace(p, placement=REPLICATE, layout=-1) for p in plan.params)
    plan = replace(plan, params=replicas)
    assert sharded_share(plan) == 0.0
    assert any("only 0% of the bytes of matmul weights are sharded" in w for w in plan_warnings(plan))


def test_ranks_without_a_part_of_a_layer_are_said():
    plan = small_plan()
    heads = next(p for p in plan.params if p.layout == 0)
    layouts = (Layout(576, (((0, 576),), ((576, 576),))), *plan.layouts[1:])
    (warning,) = plan_warnings(replace(plan, layouts=layouts))
    assert warning.startswith("1 of 2 tp ranks have no part of model.layers.*.self_attn.")
    others = tuple(p for p in plan.params if p.layout != 0)
    assert plan_warnings(replace(plan, layouts=layouts, params=others)) == []
    small = replace(heads, shape=(576, 2))  # far less than 1 % of the bytes
    assert plan_warnings(replace(plan, layouts=layouts, params=(*others, small))) == []


def test_the_planner_s_own_warnings_are_printed_once():
    text = plan_text(replace(small_plan(), warnings=("odd", "odd")))
    assert text.count("! odd") == 1


# --- pieces ----------------------------------------------------------------------------------------------------------


def test_a_layout_that_gives_a_rank_everything_is_not_sharded():
    plan = small_plan()
    whole = Layout(576, (((0, 576),), ((0, 576),)))
    plan = replace(plan, layouts=(whole, *plan.layouts[1:]))
    attention = sum(2 * 576 * 576 for p in plan.params if p.matmul and p.layout == 0)
    matmuls = sum(2 * p.shape[0] * p.shape[1] for p in plan.params if p.matmul)
    assert sharded_share(plan) == pytest.approx(1 - attention / matmuls)
    assert whole_param_bytes(plan) == matmuls + 4 * 576 * 2


def test_names_are_compressed():
    assert compress_names(["h.0", "h.1", "h.2"]) == ["h.0-2"]
    assert compress_names(["h.0", "h.2", "g.1", "wte"]) == ["h.0,2", "g.1", "wte"]
    assert compress_names(["a.0.b.1", "a.1.b.1", "a.1.b.2"]) == ["a.0-1.b.1", "a.1.b.2"]
    assert compress_names(["layer1.x", "layer2.x"]) == ["layer1.x", "layer2.x"]
    assert compress_names([]) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bytes_text(0), "0 B"),
        (bytes_text(1023), "1.0 KiB"),
        (bytes_text(1536), "1.5 KiB"),
        (bytes_text(140e9), "130 GiB"),
        (bytes_text(2**60), "1.0 EiB"),
        (seconds_text(0), "0.00 us"),
        (seconds_text(1.5e-5), "15.0 us"),
        (seconds_text(0.0123), "12.3 ms"),
        (seconds_text(2), "2.00 s"),
        (count_text(17), "17"),
        (count_text(1.5e9), "1.5 G"),
        (count_text(124e6), "124 M"),
    ],
)
def test_human_units(text, expected):
    assert text == expected


def test_a_wide_cell_is_broken_over_lines():
    lines = table([["a", "b"], [", ".join(f"block.{i}" for i in range(40)), "1"]], left=(0,), flexible=0)
    assert max(map(len, lines)) <= 120
    assert "".join(line[:117].strip() for line in lines[2:]).count("block.") == 40
