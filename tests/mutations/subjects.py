"""Correct programs to be broken: families x meshes, and the truth about them: transformers' own model, run eagerly.

A subject's programs may be replaced by broken copies; `behaviour` then says whether anybody could notice.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import autodist_fx as adx
from autodist_fx.api.compiled_model import CompiledModel
from autodist_fx.errors import CommunicationError, DeadlockError
from autodist_fx.runtime.cache.kv_cache import local_cache
from autodist_fx.simulation.backward import run_backward
from autodist_fx.simulation.run_ranks import simulate
from autodist_fx.simulation.thread_communicator import ThreadCommunicator
from autodist_fx.weights.load import load_rank
from autodist_fx.weights.sources.module_source import ModuleSource
from passes.program.rank_program import RankProgram
from tests.mutations.keyed_model import KeyedConfig, KeyedLM
from tests.support.encoders import segments, text_batch, tiny_encoder
from tests.support.models import padded_batch, randomized, relative_error, tiny_model
from tests.support.moe import FOUR, tiny_moe_model
from tests.support.routed_lm import routed_lm
from tests.support.seq2seq import seq2seq_inputs, tiny_seq2seq

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
    "phi3-mqa": lambda: tiny_model("phi3", num_key_value_heads=1),  # the KV head of a fused weight on every rank
    "bloom": _bloom,  # q, k, v interleaved per head; alibi
    "falcon": _falcon,  # q, k, v interleaved per group
    "opt": lambda: tiny_model("opt", num_attention_heads=7, hidden_size=56, word_embed_proj_dim=56),  # biases
    "mixtral": lambda: tiny_moe_model("mixtral"),
    "mixtral-dealt": lambda: tiny_moe_model("mixtral", num_hidden_layers=1, **FOUR),  # experts whole, on a rank each
    "bert": lambda: tiny_encoder("BertForMaskedLM", "bert"),
    "t5": lambda: tiny_seq2seq("t5"),
    "qwen3": lambda: tiny_model("qwen3", tie_word_embeddings=True),  # norms of heads
    "gemma2": lambda: tiny_model("gemma2", **_GEMMA),  # soft-capping; layers of two kinds
    "routed": routed_lm,  # experts as one node, whole, on a rank each
    "routed-inside": routed_lm,  # each expert cut inside
    "keyed": lambda: randomized(KeyedLM(KeyedConfig()).to(torch.float64).eval()),  # gradients: terms meet a whole
}
PINS: dict[str, dict[str, str]] = {"routed-inside": {"experts": "inner"}}
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
    form: str  # "forward", "cache" or "train"
    compiled: CompiledModel
    calls: tuple[tuple[Mapping[str, torch.Tensor], ...], ...]  # conversations of calls
    expected: tuple[tuple[Mapping[str, torch.Tensor], ...], ...]

    def __str__(self) -> str:
        return f"{self.family} {self.mesh[0]}x{self.mesh[1]}{_SAID[self.form]}"

    def programs(self) -> Programs:
        """A copy, to be broken."""
        return copy.deepcopy(_programs(self.compiled))

    def behaviour(self, programs: Programs) -> str:
        """How running `programs` with the model's weights differs from the model: "" (not at all), "hang" (or ranks
        that speak past each other, which is one wherever nobody looks), "error" or "wrong". On a transport with
        channels, as Gloo's, and on one where messages between two ranks are told apart by their order, as NCCL's."""
        with contextlib.redirect_stderr(io.StringIO()):  # fx prints where a graph failed
            found = self._behaviour(programs)
            if found:
                return found
            with _without_channels():
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
            if self.form == "train":
                return self._backward(programs)
            for calls, expected in zip(self.calls, self.expected, strict=True):
                caches = [local_cache(model.config, program) for program in programs] if self.form == "cache" else []
                for given, wanted in zip(calls, expected, strict=True):
                    per_rank = [{**given, "past_key_values": cache} for cache in caches] or [given] * len(programs)
                    if not _same(simulate(programs, per_rank), wanted, given, self.mesh):
                        return "wrong"
        except (DeadlockError, CommunicationError):
            return "hang"
        except Exception:
            return "error"
        return ""

    def _backward(self, programs: Programs) -> str:
        for (given,), (wanted,) in zip(self.calls, self.expected, strict=True):
            loss, gradients = run_backward(programs, given)
            if relative_error(loss, wanted["loss"]) > TOLERANCE:
                return "wrong"
            largest = max(float(g.abs().max()) for name, g in wanted.items() if name != "loss")
            for program, own in zip(programs, gradients, strict=True):
                for path, gradient in own.items():
                    shard = program.param_shards[path]
                    whole = wanted[shard.source]
                    rows = [i for a, b in shard.intervals for i in range(a, b)]
                    share = whole if shard.dim is None else whole.index_select(shard.dim, torch.tensor(rows).long())
                    if gradient.shape != share.shape:
                        return "wrong"
                    scale = max(float(whole.abs().max()), 1e-6 * largest)  # a bias of keys has none, but for rounding
                    if share.numel() and not bool((gradient - share).abs().max() <= TOLERANCE * scale):
                        return "wrong"
                for path, parameter in program.graph_module.named_parameters():
                    if path not in own and parameter.numel() and wanted[program.param_shards[path].source].any():
                        return "wrong"
        return ""


@contextlib.contextmanager
def _without_channels() -> Iterator[None]:
    """Messages between two ranks arrive in the order in which they were sent, whatever their channels."""
    tagged_send, tagged_recv = ThreadCommunicator.send, ThreadCommunicator.recv

    def send(self: ThreadCommunicator, x: torch.Tensor, to: int, channel: int) -> None:
        tagged_send(self, x, to, 0)

    def recv(self: ThreadCommunicator, shape: Any, dtype: Any, device: Any, source: int, channel: int) -> torch.Tensor:
        return tagged_recv(self, shape, dtype, device, source, 0)

    with mock.patch.multiple(ThreadCommunicator, send=send, recv=recv):
        yield


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
def subject(family: str, mesh: Mesh, form: str = "forward") -> Subject:
    """Compiled once per process; not verified."""
    model, use_cache, pin = model_of(family), form == "cache", PINS.get(family, {}) if mesh[0] > 1 else {}
    if form == "train":
        compiled = adx.compile(
            model, tp=mesh[0], pp=mesh[1], verify=False, train=True, pin=pin,
            input_names=(*_MAIN_INPUTS[family], "labels"),
        )  # fmt: skip
    else:
        compiled = adx.compile(model, tp=mesh[0], pp=mesh[1], use_cache=use_cache, verify=False, pin=pin)
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
            if family.startswith(("bloom", "falcon", "mixtral", "gemma2")):  # NaN or a lost token in padding
                mask = torch.ones_like(ids)
            inputs = {"input_ids": ids, "attention_mask": mask}
            if use_cache:
                inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        if form == "train":
            tokens = inputs["decoder_input_ids" if family == "t5" else "input_ids"]
            inputs = {**inputs, "labels": tokens.roll(1, 1)}
        conversations.append(inputs)
    calls, expected = [], []
    if form == "train":
        given = [{name: inputs[name] for name in names} for inputs in conversations]
        wanted = [({**_gradients(model, inputs)},) for inputs in given]
        return Subject(family, mesh, form, compiled, tuple((g,) for g in given), tuple(wanted))
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
    return Subject(family, mesh, form, compiled, tuple(calls), tuple(expected))


_NO_CACHE = {"use_cache": False}
_SAID = {"forward": "", "cache": " with a cache", "train": " to be trained"}
_MAIN_INPUTS = {
    family: ("input_ids", "attention_mask", *(("decoder_input_ids",) if family == "t5" else ())) for family in MODELS
}


def _gradients(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The loss, and its gradient of each parameter by each of its names; zeros where it does not depend on one."""
    with torch.enable_grad():
        loss = model(**inputs).loss
        named = dict(model.named_parameters(remove_duplicate=False))
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    gradients = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}
    return {"loss": loss.detach(), **gradients}


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


def subjects() -> list[tuple[str, Mesh, str]]:
    """All there are, as arguments of `subject`."""
    return [
        (family, mesh, form)
        for family in MODELS
        for mesh in MESHES
        for form in ("forward", "train", *(("cache",) if family in CACHED else ()))
    ]
