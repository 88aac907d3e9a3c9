"""verify: Weights, caches and outputs that are wrong are refused, with the rank, the node and the reason."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from passes.ops.parallel_layers import RowParallelLinear
from tests.support.graphs.broken_programs import (
    BrokenPrograms,
    Programs,
    calls,
    check_refused,
    with_argument,
    with_slice,
)

broken = BrokenPrograms()

# -- weights -----------------------------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


@broken("llama", 2, 1, r"q_proj.weight .*element 0 of dim 0 is on no rank of stage 0 \(1 are missing\)")
def slice_shifted_by_one(programs: Programs) -> None:
    (start, stop) = programs[0].param_shards[Q].intervals[0]
    with_slice(programs[0], Q, [(start + 1, stop + 1)])


@broken("llama", 2, 1, r"down_proj.weight .*element 0 of dim 1 is on 2 ranks of stage 0, which the plan does not say")
def elements_owned_twice(programs: Programs) -> None:
    with_slice(programs[1], DOWN, [(0, 80)])


@broken("llama", 2, 1, r"q_proj.weight is not dealt as the plan says: rank 0 has \[\(0, 31\)\]")
def border_between_ranks_moved(programs: Programs) -> None:
    with_slice(programs[0], Q, [(0, 31)])
    with_slice(programs[1], Q, [(31, 48)])


@broken("llama", 2, 1, r"q_proj.weight is not dealt as the plan says")
def slices_of_two_ranks_swapped(programs: Programs) -> None:
    a, b = (program.param_shards[Q].intervals for program in programs)
    with_slice(programs[0], Q, b)
    with_slice(programs[1], Q, a)


@broken("gpt2", 2, 1, r"c_attn.weight holds \[\(48, 72\), \(0, 24\), .*: not ascending pieces of it")
def segments_of_a_fused_weight_in_another_order(programs: Programs) -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    first, second, third = programs[0].param_shards[name].intervals
    with_slice(programs[0], name, (second, first, third))


NORM = "model.decoder.layers.1.final_layer_norm"


@broken("opt", 2, 2, r"no rank of stage 1 holds model.decoder.layers.1.final_layer_norm.bias, which the stage uses")
def parameter_missing(programs: Programs) -> None:
    for program in programs[2:]:
        del program.param_shards[f"{NORM}.bias"]  # type: ignore[attr-defined]
        program.graph_module.get_submodule(NORM).bias = None


@broken("opt", 2, 1, r"final_layer_norm.bias .* is whole on ranks \[0\] and missing on \[1\]")
def parameter_missing_on_one_rank(programs: Programs) -> None:
    del programs[1].param_shards[f"{NORM}.bias"]  # type: ignore[attr-defined]
    programs[1].graph_module.get_submodule(NORM).bias = None


@broken("llama", 2, 1, r"rank 1 .*nothing says what model.norm.weight is loaded from")
def parameter_without_a_source(programs: Programs) -> None:
    del programs[1].param_shards["model.norm.weight"]


@broken("llama", 2, 1, r"rank 0 .*q_proj.weight is \[31, 48\], and its share of .* is \[\d+, 48\]")
def local_shape_is_not_the_shards(programs: Programs) -> None:
    module = programs[0].graph_module.get_submodule("model.layers.0.self_attn.q_proj")
    module.weight = torch.nn.Parameter(torch.empty(31, 48, device="meta"))


@broken("llama", 2, 1, r"input 1 is .*layers.1.*q_proj.weight where the model's op reads .*layers.0")
def weights_of_two_layers_swapped(programs: Programs) -> None:
    for program in programs:
        shards = program.param_shards
        other = Q.replace("layers.0", "layers.1")
        shards[Q], shards[other] = (  # type: ignore[index]
            dataclasses.replace(shards[other], name=Q),
            dataclasses.replace(shards[Q], name=other),
        )


@broken("gpt2", 2, 1, r"are both the same piece of transformer.wte.weight, and not one tensor")
def tie_cut(programs: Programs) -> None:
    head = programs[0].graph_module.get_submodule("lm_head")
    head.weight = torch.nn.Parameter(head.weight.detach().clone())


@broken("opt", 2, 1, r"rank 0 .*out_proj \(RowParallelLinear, .*its bias is added on ranks \[0, 1\] instead of one")
def bias_on_every_rank(programs: Programs) -> None:
    name = "model.decoder.layers.0.self_attn.out_proj"
    programs[1].graph_module.get_submodule(name).bias = programs[0].graph_module.get_submodule(name).bias
    programs[1].param_shards[f"{name}.bias"] = programs[0].param_shards[f"{name}.bias"]


@broken("opt", 2, 1, r"no rank of stage 0 holds model.decoder.layers.0.self_attn.out_proj.bias")
def bias_on_no_rank(programs: Programs) -> None:
    name = "model.decoder.layers.0.self_attn.out_proj"
    module = programs[0].graph_module.get_submodule(name)
    assert isinstance(module, RowParallelLinear)
    module.bias = None
    del programs[0].param_shards[f"{name}.bias"]


@broken("opt", 2, 1, r"q_proj.bias\) is dealt out on stage 0, and ranks \[1\] have no share")
def bias_of_a_column_missing(programs: Programs) -> None:
    name = "model.decoder.layers.0.self_attn.q_proj"
    programs[1].graph_module.get_submodule(name).bias = None
    del programs[1].param_shards[f"{name}.bias"]


@broken("gpt2", 2, 1, r"rank 1 .*looks up S\(0\) with elements 0:64, and its table is S\(0\) with elements 64:128")
def rows_of_another_rank(programs: Programs) -> None:
    programs[1].graph_module.get_submodule("transformer.wte").intervals = ((0, 64),)


# -- caches and outputs ------------------------------------------------------------------------------------------------


@broken("llama", 2, 2, r"rank 2 .*update.*writes cache layer 1 of this rank, whose layers are those numbered \[1\]",
        use_cache=True)  # fmt: skip
def cache_layer_off_by_one(programs: Programs) -> None:
    with_argument(calls(programs[2], "update")[0], 3, 1)


@broken("llama", 2, 1, r"writes cache layer 1 .*the model writes 0", use_cache=True)
def cache_layers_swapped(programs: Programs) -> None:
    for program in programs:
        first, second = calls(program, "update")
        with_argument(first, 3, 1)
        with_argument(second, 3, 0)


@broken("llama", 1, 2, r"layers are those numbered \[0\] in the model; the model writes 1", use_cache=True)
def cache_of_another_stage(programs: Programs) -> None:
    programs[1].cache_layers = (0,)


@broken("llama", 2, 1, r"writes its 2 cache layers in the order \[1, 0\]", use_cache=True)
def cache_in_another_order(programs: Programs) -> None:
    for program in programs:
        program.cache_layers = (1, 0)
        for node, layer in zip(calls(program, "update"), (1, 0), strict=True):
            with_argument(node, 3, layer)


@broken("llama", 2, 1, r"update.* input 0 is transpose_\d where the model's op reads add_\d", use_cache=True)
def values_cached_as_keys(programs: Programs) -> None:
    for program in programs:
        node = calls(program, "update")[0]
        cache, key, value, *rest = node.args
        node.args = (cache, value, key, *rest)


@broken("llama", 1, 1, r"attention.* input 1 is add_\d where the model's op reads", use_cache=True)
def cache_not_written(programs: Programs) -> None:
    node = calls(programs[0], "update")[0]
    for piece, tensor in zip(list(node.users), node.args[1:3], strict=True):
        piece.replace_all_uses_with(tensor)
        piece.graph.erase_node(piece)
    node.graph.erase_node(node)


@broken("llama", 1, 2, r"no rank returns lm_head, an output of the model")
def output_lost(programs: Programs) -> None:
    output = next(n for n in programs[1].graph_module.graph.nodes if n.op == "output")
    output.args = ({k: v for k, v in output.args[0].items() if k != "logits"},)


@broken("llama", 2, 1, r"rank 1 .*returns \['scores'\], rank 0 \['logits'\]")
def output_under_another_name(programs: Programs) -> None:
    output = next(n for n in programs[1].graph_module.graph.nodes if n.op == "output")
    output.args = ({"scores": output.args[0]["logits"]},)


@broken("llama", 2, 1, r"returns lm_head as scores, and the model returns logits only")
def output_under_another_name_on_every_rank(programs: Programs) -> None:
    for program in programs:
        output = next(n for n in program.graph_module.graph.nodes if n.op == "output")
        output.args = ({"scores": output.args[0]["logits"]},)


@broken("llama", 1, 1, r"returns mul_\d+ as logits, which is no output of the model")
def another_output(programs: Programs) -> None:
    output = next(n for n in programs[0].graph_module.graph.nodes if n.op == "output")
    output.args = ({"logits": output.args[0]["logits"].args[0]},)


@pytest.mark.drawn(14)
@pytest.mark.parametrize("case", broken.cases, ids=str)
def test_broken_programs_are_refused(case) -> None:
    check_refused(case)
