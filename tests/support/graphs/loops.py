"""Models whose forward loops over a length, and their traced graphs."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaForCausalLM

from autodist_fx.tracing.control_flow.loops.range_loops import outlined_loops
from autodist_fx.tracing.tracer import Tracer


class ListScan(nn.Module):
    """A recurrence whose outputs are gathered in a list, with a branch that ends in another loop over lengths."""

    block = 3

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.rand(4))

    def forward(self, x):
        state = torch.zeros_like(x[:, 0])
        if self.block > 1:
            outputs = []
            for i in range((x.shape[1] + self.block - 1) // self.block):
                stop = min((i + 1) * self.block, x.shape[1])
                part = x[:, i * self.block : stop]
                outputs.append(part + state[:, None])
                state = state * self.decay + part.sum(1)
        else:
            outputs = []
            for t in range(x.shape[1]):
                state = state * self.decay + x[:, t]
                outputs.append(state[:, None])
        outputs = torch.cat(outputs, dim=1)
        return outputs * 2, state


class InPlaceScan(nn.Module):
    """Writes into a tensor that is read before the loop and after it."""

    def forward(self, x):
        y = torch.zeros_like(x)
        before = y + 1
        total = x[:, 0] * 0
        for t in range(x.shape[1]):
            if t % 2 == 0:
                doubled = x[:, t] * 2
            total += doubled
            y[:, t] = total
        return y + before, total


class KeywordScan(nn.Module):
    """Hands keywords on to what each step calls."""

    def forward(self, x):
        return scan(x, weight=2.0)


def step(x, weight, bias=0.0):
    return x * weight + bias


def scan(x, **keywords):
    outputs, total = [], x[:, 0] * 0
    for t in range(x.shape[1]):
        total = step(total + x[:, t], **keywords)
        outputs.append(total)
    outputs = torch.stack(outputs, dim=1)
    return outputs, total


def traced_loop(module: nn.Module, x: torch.Tensor) -> torch.fx.GraphModule:
    with outlined_loops([__name__]), torch.no_grad():
        tracer = Tracer(module, {"x": x.to("meta")}, {"x": x.repeat(1, 2, 1).to("meta")})
        tracer._TORCH_METHODS_TO_PATCH = []
        graph = tracer.trace(module, dummy_inputs={"x": x.to("meta")})
    return torch.fx.GraphModule(module, graph)


class Chunked(LlamaForCausalLM):
    """Adds up its logits in chunks of eight tokens, and what is left behind them one by one; stacks the latter."""

    def forward(self, input_ids=None, **keywords):
        output = super().forward(input_ids=input_ids, **keywords)
        whole = output.logits.shape[1] // 8 * 8
        parts = [output.logits[:, :whole].reshape(input_ids.shape[0], -1, 8, 16).cumsum(2).flatten(1, 2)]
        left = output.logits.shape[1] - whole
        if left > 0:
            parts.append(added_up(output.logits[:, whole:]))
        output.logits = torch.cat(parts, 1) + torch.tensor([1], dtype=int)
        return output


def added_up(x):
    """[batch, tokens, classes]; refuses no tokens, as torch.stack does."""
    sums, total = [], torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        total = total + x[:, t]
        sums.append(total)
    stacked = torch.stack(sums, 1)
    return stacked
