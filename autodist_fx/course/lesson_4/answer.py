"""Lesson 4: a whole Llama, over tensor parallel ranks. Choose each linear's role, keep heads whole, put the parts in.

Fill in the three holes, then run

    autodist-fx course check 4
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from autodist_fx.course.lesson_3.answer import ColumnParallelLinear, RowParallelLinear, share
from passes.ops.comm import all_reduce


class RowAndSum(RowParallelLinear):
    """A RowParallelLinear that adds up the ranks' terms itself, since a module has no graph to insert a node into."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return all_reduce(super().forward(x), "tp")


def role(name: str) -> str:
    """Return "column" or "row" for a linear inside a layer, by its name, and "whole" for whatever each rank keeps.

    The linears are q_proj, k_proj, v_proj and o_proj of the attention, gate_proj, up_proj and down_proj of the MLP. In
    a layer there are to be two sums over ranks, and no other message.
    """
    # hole
    if name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        return "column"
    return "row" if name in ("o_proj", "down_proj") else "whole"
    # end


def head_slices(config: PretrainedConfig, tp_rank: int, tp: int) -> tuple[slice, slice]:
    """Return this rank's outputs of q_proj, and those of k_proj and v_proj. Heads stay whole, and a query head is where
    its key is.

    The config has num_attention_heads, num_key_value_heads (each read by as many query heads as follow from the two)
    and head_dim, the outputs of one head. Deal the KV heads to the ranks by `share`.
    """
    # hole
    heads = share(config.num_key_value_heads, tp_rank, tp)
    of_key = config.head_dim
    of_queries = of_key * (config.num_attention_heads // config.num_key_value_heads)
    return (
        slice(heads.start * of_queries, heads.stop * of_queries),
        slice(heads.start * of_key, heads.stop * of_key),
    )
    # end


def parallelize(model: PreTrainedModel, tp_rank: int, tp: int) -> PreTrainedModel:
    """Put this rank's parts in place of the linears of a LlamaForCausalLM, and return it.

    Layers are model.model.layers, each with self_attn and mlp. owner.named_children() has a module's own modules, and
    setattr(owner, name, part) puts another in one's place. o_proj reads what the rank's query heads give, and
    down_proj what its part of the MLP gives, which `share` deals.
    """
    # hole
    queries, keys = head_slices(model.config, tp_rank, tp)
    inside = share(model.config.intermediate_size, tp_rank, tp)
    parts = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}
    for layer in model.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name, linear in list(owner.named_children()):
                if role(name) == "column":
                    setattr(owner, name, ColumnParallelLinear(linear, parts.get(name, inside)))
                elif role(name) == "row":
                    setattr(owner, name, RowAndSum(linear, parts.get(name, inside), tp_rank))
    return model
    # end


def linears(model: nn.Module) -> list[str]:
    """Return the paths of the modules of layer 0 that have a weight, for a look at what there is."""
    return [path for path, module in model.named_modules() if "layers.0." in path and hasattr(module, "weight")]
