"""Random configs of decoder families whose sizes divide by nothing, on random meshes of up to 8 ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.support.models import randomized

Mesh = tuple[int, int]  # (tp, pp)
MESHES: list[Mesh] = [(tp, pp) for pp in range(1, 5) for tp in range(1, 9) if tp * pp <= 8]

# How q, k and v lie, and the two projections of the MLP that read its input: one product each, or fused.
SEPARATE = ("llama", "qwen2", "qwen3", "mistral")
FUSED = ("phi3", "gpt2", "gpt_neox", "falcon")  # q | k | v; thirds, transposed; q, k, v per head; the q heads, k, v
FAMILIES = (*SEPARATE, *FUSED)  #                 per group, or all q heads, then k and v
_HIDDEN_IS_FREE = ("qwen2", "qwen3", "mistral", "phi3")


@dataclass(frozen=True)
class Case:
    """A model small enough to be built a hundred times. Printed by hypothesis, it is the test to write down."""

    family: str
    mesh: Mesh
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    wide: int
    vocab: int
    tied: bool = False
    attention: str = "sdpa"
    switches: tuple[tuple[str, Any], ...] = ()

    def model(self) -> PreTrainedModel:
        """In float64."""
        config = AutoConfig.for_model(self.family, **self._fields(), **dict(self.switches))
        model = AutoModelForCausalLM.from_config(config, attn_implementation=self.attention)
        return randomized(model.to(torch.float64).eval())

    def _fields(self) -> dict[str, Any]:
        common = {
            "vocab_size": self.vocab, "tie_word_embeddings": self.tied, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2,
        }  # fmt: skip
        if self.family == "gpt2":
            return common | {
                "n_embd": self.hidden, "n_head": self.heads, "n_layer": self.layers, "n_inner": self.wide,
                "n_positions": 128,
            }  # fmt: skip
        common |= {
            "hidden_size": self.hidden, "num_attention_heads": self.heads, "num_hidden_layers": self.layers,
            "max_position_embeddings": 128,
        }  # fmt: skip
        if self.family == "falcon":
            return common | {"ffn_hidden_size": self.wide, "num_kv_heads": self.kv_heads}
        common["intermediate_size"] = self.wide
        if self.family == "gpt_neox":
            return common
        return common | {"head_dim": self.head_dim, "num_key_value_heads": self.kv_heads}


_flag = st.booleans()
_SWITCHES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "llama": {"attention_bias": _flag, "mlp_bias": _flag},
    "qwen2": {},
    "qwen3": {"attention_bias": _flag},
    "mistral": {"sliding_window": st.sampled_from([None, 3, 50])},
    "phi3": {"partial_rotary_factor": st.sampled_from([1.0, 0.5])},
    "gpt2": {"activation_function": st.sampled_from(["gelu_new", "relu"])},
    "gpt_neox": {"attention_bias": _flag, "use_parallel_residual": _flag, "rotary_pct": st.sampled_from([1.0, 0.5])},
    "falcon": {
        "new_decoder_architecture": _flag, "multi_query": _flag, "parallel_attn": _flag, "bias": _flag, "alibi": _flag,
    },
}  # fmt: skip


@st.composite
def cases(draw: st.DrawFn, family: str) -> Case:
    mesh = draw(st.sampled_from(MESHES))
    kv_heads = draw(st.integers(1, 5))
    heads = kv_heads * draw(st.integers(1, 4))
    head_dim = 4 * draw(st.integers(1, 2))  # rotary halves it, and half of it
    switches = {name: draw(values) for name, values in _SWITCHES[family].items()}
    if family in ("gpt2", "gpt_neox"):
        kv_heads = heads
    elif family == "falcon" and switches["new_decoder_architecture"]:
        switches["parallel_attn"] = True  # it has no norm for the other order
    elif family == "falcon":
        kv_heads = 1 if switches["multi_query"] else heads
    return Case(
        family,
        mesh,
        layers=draw(st.integers(mesh[1], 4)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden=draw(_hidden_sizes(family, heads, head_dim)),
        wide=draw(st.integers(1, 50)),
        vocab=draw(st.integers(4, 60)),
        tied=draw(_flag),
        attention=draw(st.sampled_from(["sdpa", "eager"])),
        switches=tuple(switches.items()),
    )


def _hidden_sizes(family: str, heads: int, head_dim: int) -> st.SearchStrategy[int]:
    if family in _HIDDEN_IS_FREE:
        return st.integers(2, 40)
    if family == "llama":  # transformers 5 wants a multiple of the heads, whatever head_dim says
        return st.integers(1, 4).map(lambda width: heads * width)
    return st.just(heads * head_dim)


def most_held(case: Case) -> dict[str, dict[int, int]]:
    """How many elements of the dim that is cut the fullest tp rank may hold: by the end of a weight's name, for each
    dim that may be cut.

    From the architecture alone. What cannot be cut apart is a query head; where there are as many KV heads as ranks, a
    KV head with its query heads; a neuron of the MLP; a token's row or column of a table. Of n such pieces the fullest
    of tp ranks has to hold ceil(n / tp), which is less than one more than its share n / tp, and may hold no more. Where
    KV heads are fewer than ranks, a rank holds those that its query heads read: at most ceil((m - 1) / r) + 1 of them
    for m query heads in a row, r to a KV head.
    """
    tp, size = case.mesh[0], case.head_dim
    group = case.heads // case.kv_heads

    def share(n: int) -> int:
        return -(-n // tp)

    if case.kv_heads >= tp:
        keys = share(case.kv_heads)
        queries = keys * group
    else:
        queries = share(case.heads) if case.heads > 1 else 1
        keys = min(case.kv_heads, -(-(queries - 1) // group) + 1)
    q, kv, neurons = {0: queries * size}, {0: keys * size}, share(case.wide)
    table = {0: share(case.vocab), 1: share(case.hidden)}
    if case.family in SEPARATE:
        return {
            "q_proj": q, "k_proj": kv, "v_proj": kv, "o_proj": {1: q[0]}, "gate_proj": {0: neurons},
            "up_proj": {0: neurons}, "down_proj": {1: neurons}, "embed_tokens": table, "lm_head": table,
        }  # fmt: skip
    if case.family == "phi3":
        return {
            "qkv_proj": {0: q[0] + 2 * kv[0]}, "o_proj": {1: q[0]}, "gate_up_proj": {0: 2 * neurons},
            "down_proj": {1: neurons}, "embed_tokens": table, "lm_head": table,
        }  # fmt: skip
    if case.family == "gpt2":  # its weights are transposed
        return {
            "c_attn": {1: 3 * q[0]}, "attn.c_proj": {0: q[0]}, "c_fc": {1: neurons}, "mlp.c_proj": {0: neurons},
            "wte": table, "wpe": {0: share(128), 1: table[1]}, "lm_head": table,
        }  # fmt: skip
    if case.family == "gpt_neox":
        return {
            "query_key_value": {0: 3 * q[0]}, "dense": {1: q[0]}, "dense_h_to_4h": {0: neurons},
            "dense_4h_to_h": {1: neurons}, "embed_in": table, "embed_out": table,
        }  # fmt: skip
    return {"word_embeddings": table, "lm_head": table}
