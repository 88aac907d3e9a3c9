"""A small program measured: what its calls take beside what their tables say, and a step of generating beside it.

Measured with a model so small that nothing but calls takes time: its graph has nodes of many kinds, and weights that
are looked up in modules, where the chains of the tables have one kind.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from autodist_fx.api.compile import compile
from autodist_fx.measure.predict import Forecast
from cost_model.costs.hardware import Hardware
from cost_model.costs.measured import Measured
from cost_model.mesh import Mesh
from cost_model.request.plan_request import PlanRequest

_TOKENS, _PROMPT = 48, 16


def measure_program(machine: Hardware, device: str) -> Measured:
    """Return what was measured of `machine` with its node_factor and step_seconds, measured in this process."""
    assert machine.measured is not None
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = _seconds(machine, device)
    finally:
        torch.set_num_threads(before)
    return replace(
        machine.measured,
        node_factor=float(f"{found.program / found.predicted:.4g}"),
        step_seconds=float(f"{max(0.0, found.step - found.program):.4g}"),
        start_seconds=float(f"{max(0.0, found.first - found.step):.4g}"),
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """Median seconds of a step's program, of a step with all around it, and of generating one token; and what is
    predicted of the program."""

    program: float
    step: float
    first: float
    predicted: float


def _seconds(machine: Hardware, device: str) -> _Found:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config())
    rank: Any = compile(model, hardware=machine, verify=False).to_distributed(device=device)
    spent: list[float] = []
    run_variant = rank.run_variant

    def timed(*args: Any) -> Any:
        began = time.perf_counter()
        found = run_variant(*args)
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
        return found

    prompt = torch.ones(1, _PROMPT, dtype=torch.long, device=rank.device)

    def generate(tokens: int) -> float:
        spent.clear()
        began = time.perf_counter()
        rank.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=False,
        )  # fmt: skip
        return time.perf_counter() - began

    rank.run_variant = timed
    generate(_TOKENS)
    steps, programs, firsts = [], [], []
    for _ in range(5):
        firsts.append(generate(1))
        steps.append((generate(_TOKENS) - firsts[-1]) / (_TOKENS - 1))
        programs.append(statistics.median(spent[1:]))
    predicted = Forecast(model.config).step(PlanRequest(Mesh(), machine), 1, 1, _PROMPT + _TOKENS // 2).seconds
    return _Found(statistics.median(programs), statistics.median(steps), statistics.median(firsts), predicted)


def _config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, bos_token_id=None, eos_token_id=None, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
