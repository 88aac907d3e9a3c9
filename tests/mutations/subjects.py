"""Correct programs to be broken: families x meshes, and the truth about them: transformers' own model, run eagerly.

A subject's programs may be replaced by broken copies; `behaviour` then says whether anybody could notice.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tiny_encoders import segments, text_batch, tiny_encoder
from tiny_models import padded_batch, randomized, tiny_model
from tiny_moe import tiny_moe_model
from tiny_seq2seq import seq2seq_inputs, tiny_seq2seq
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import autodist_fx as adx
from autodist_fx.compiled import CompiledModel
from autodist_fx.errors import CommunicationError, DeadlockError
from autodist_fx.runtime.local_cache import local_cache
from autodist_fx.runtime.simulate import simulate
from autodist_fx.weights.load import load_rank
from autodist_fx.weights.module_source import ModuleSource
from passes.program import RankProgram

Programs = list[RankProgram]
Mesh = tuple[int, int]  # tp, pp
MESHES: tuple[Mesh, ...] = ((2, 1), (3, 1), (1, 2), (2, 2), (3, 2))
TOLERANCE = 1e-5  # of the largest value: some families compute norms and rotary tables in float32


def _bloom() -> PreTrainedModel:
    config = AutoConfig.for_model("bloom", vocab_size=128, hidden_size=48, n_layer=2, n_head=6, pad_token_id=0)
    return randomized(AutoModelForCausalLM.from_config(config).to(torch.float64).eval())


def _falcon() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "falcon", vocab_size=128, hidden_size=48, num_hidden_layers=2, num_attention_heads=6,
        new_decoder_architecture=True, num_kv_heads=2, pad_token_id=0,
    )  # fmt: skip
    return randomized(AutoModelForCausalLM.from_config(config).to(torch.float64).eval())


_GEMMA = {"num_hidden_layers": 4, "query_pre_attn_scalar": 8, "sliding_window": 4}
# How weights, heads and biases lie differs from one to the next; sizes that no mesh divides.
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny_model("llama", num_attention_heads=10, num_key_value_heads=2, vocab_size=127),  # GQA, uneven
    "gpt2": lambda: tiny_model("gpt2", n_head=7, n_embd=56, vocab_size=127),  # fused q|k|v, transposed, tied
    "phi3": lambda: tiny_model("phi3", intermediate_size=53),  # fused q|k|v and gate|up
    "bloom": _bloom,  # q, k, v interleaved per head; alibi
    "falcon": _falcon,  # q, k, v interleaved per group
    "opt": lambda: tiny_model("opt", num_attention_heads=7, hidden_size=56, word_embed_proj_dim=56),  # biases
    "mixtral": lambda: tiny_moe_model("mixtral"),
    "bert": lambda: tiny_encoder("BertForMaskedLM", "bert"),
    "t5": lambda: tiny_seq2seq("t5"),
    "qwen3": lambda: tiny_model("qwen3", tie_word_embeddings=True),  # norms of heads
    "gemma2": lambda: tiny_model("gemma2", **_GEMMA),  # soft-capping; layers of two kinds
}
CACHED = ("llama", "gpt2", "phi3", "falcon", "opt", "qwen3", "gemma2")  # those that are also broken with a KV cache


@functools.cache
def model_of(family: str) -> PreTrainedModel:
    return MODELS[family]()


@dataclass(frozen=True)
class Subject:
    """`inputs` are those of consecutive calls (a prompt and steps, with a cache); `expected` the model's own outputs of
    each, with a mask of what counts."""

    family: str
    mesh: Mesh
    use_cache: bool
    compiled: CompiledModel
    calls: tuple[tuple[Mapping[str, torch.Tensor], ...], ...]  # conversations of calls
    expected: tuple[tuple[Mapping[str, torch.Tensor], ...], ...]

    def __str__(self) -> str:
        return f"{self.family} {self.mesh[0]}x{self.mesh[1]}{' with a cache' if self.use_cache else ''}"

    def programs(self) -> Programs:
        """A copy, to be broken."""
        return copy.deepcopy(_programs(self.compiled))

    def behaviour(self, programs: Programs) -> str:
        """How running `programs` with the model's weights differs from the model: "" (not at all), "hang" (or ranks
        that speak past each other, which is one wherever nobody looks), "error" or "wrong"."""
        with contextlib.redirect_stderr(io.StringIO()):  # fx prints where a graph failed
            return self._behaviour(programs)

    def _behaviour(self, programs: Programs) -> str:
        model = model_of(self.family)
        try:
            for program in programs:
                load_rank(
                    program, ModuleSource(model), buffers=self.compiled.buffers,
                    base_model_prefix=model.base_model_prefix,
                )  # fmt: skip
                program.graph_module.recompile()
            for calls, expected in zip(self.calls, self.expected, strict=True):
                caches = [local_cache(model.config, program) for program in programs] if self.use_cache else []
                for given, wanted in zip(calls, expected, strict=True):
                    per_rank = [{**given, "past_key_values": cache} for cache in caches] or [given] * len(programs)
                    if not _same(simulate(programs, per_rank), wanted, given, self.mesh):
                        return "wrong"
        except (DeadlockError, CommunicationError):
            return "hang"
        except Exception:
            return "error"
        return ""


@functools.cache
def _emitted(compiled: CompiledModel) -> tuple[RankProgram, ...]:
    return tuple(compiled.program(rank) for rank in range(compiled.mesh.size))


def _programs(compiled: CompiledModel) -> Programs:
    return list(_emitted(compiled))


def _same(
    outputs: list[dict[str, Any]], wanted: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], mesh: Mesh
) -> bool:
    """Is each output, on every rank that returns it, the model's; and is it on all ranks of some stage?"""
    mask = given.get("decoder_attention_mask", given["attention_mask"])
    for name, value in wanted.items():
        found = [output[name] for output in outputs if name in output]
        if len(found) < mesh[0]:
            return False
        for own in found:
            if own.shape != value.shape or own.dtype != value.dtype:
                return False
            kept = mask[:, -value.shape[1] :].bool() if name == "logits" else slice(None)
            difference = (own[kept] - value[kept]).abs().max()
            if not bool(difference <= TOLERANCE * value[kept].abs().max()):  # NaN is different
                return False
    return True


@functools.cache
def subject(family: str, mesh: Mesh, use_cache: bool = False) -> Subject:
    """Compiled once per process; not verified."""
    model = model_of(family)
    compiled = adx.compile(model, tp=mesh[0], pp=mesh[1], use_cache=use_cache, verify=False)
    names = compiled.program(0).input_names
    conversations = []
    for batch, seq in ((2, 9), (3, 6)):  # of two sizes, neither of them an example's
        if family == "t5":
            inputs = seq2seq_inputs(model, batch, source=seq, target=seq - 2)
        elif family == "bert":
            inputs = {**text_batch(), "token_type_ids": segments()}
            if batch == 3:
                inputs = {name: value[:1, 2:9] for name, value in inputs.items()}
        else:
            ids, mask = padded_batch(batch, seq)
            if family in ("bloom", "falcon", "mixtral"):  # NaN of their own, or a lost token, where a row is padding
                mask = torch.ones_like(ids)
            inputs = {"input_ids": ids, "attention_mask": mask}
            if use_cache:
                inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        conversations.append(inputs)
    calls, expected = [], []
    with torch.no_grad():
        for inputs in conversations:
            steps = _steps(inputs) if use_cache else [inputs]
            given = [{name: step[name] for name in names if name in step} for step in steps]
            calls.append(tuple(given))
            known = {k: v for k, v in inputs.items() if k != "position_ids" or _takes_positions(model)}
            whole = model(**{k: v.clone() for k, v in known.items()}, **({} if family == "bert" else _NO_CACHE))
            outputs = {k: v for k, v in whole.items() if isinstance(v, torch.Tensor)}
            if use_cache:
                widths = [step["input_ids"].shape[1] for step in steps]
                pieces = torch.split(outputs["logits"], widths, dim=1)
                expected.append(tuple({"logits": piece} for piece in pieces))
            else:
                expected.append((outputs,))
    return Subject(family, mesh, use_cache, compiled, tuple(calls), tuple(expected))


_NO_CACHE = {"use_cache": False}


def _takes_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _steps(inputs: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """A prompt of all but three tokens, then two steps of two and one."""
    length = inputs["input_ids"].shape[1]
    bounds = [(0, length - 3), (length - 3, length - 1), (length - 1, length)]
    return [
        {
            "input_ids": inputs["input_ids"][:, a:b], "position_ids": inputs["position_ids"][:, a:b],
            "attention_mask": inputs["attention_mask"][:, :b], "cache_position": torch.arange(a, b),
        }
        for a, b in bounds
    ]  # fmt: skip


def subjects() -> list[tuple[str, Mesh, bool]]:
    """All there are, as arguments of `subject`."""
    return [
        (family, mesh, use_cache)
        for family in MODELS
        for mesh in MESHES
        for use_cache in ((False, True) if family in CACHED else (False,))
    ]
