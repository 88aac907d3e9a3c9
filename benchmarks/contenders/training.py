"""Ways to train a causal LM on two ranks: each has `step(input_ids) -> loss`, with AdamW, in every rank's process."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from .megatron_tp import column

MICROBATCHES = 4  # of the pipelines
LEARNING_RATE = 1e-4


class Trains(Protocol):
    """A model in training."""

    def step(self, ids: Tensor) -> float:
        """Train on token ids [rows, tokens], which are the labels, too; return the loss of all rows."""
        ...


def build(name: str, path: str) -> Trains:
    """Build one of them in this process, which is a rank."""
    makers: dict[str, Any] = {
        "ours_tp": functools.partial(_Ours, tp=2),
        "ours_pp": functools.partial(_Ours, pp=2, microbatches=MICROBATCHES),
        "ours_dp": functools.partial(_Ours, dp=2),
        "transformers_tp": _TransformersTP,
        "megatron_tp": _MegatronTP,
        "torch_1f1b": _Torch1F1B,
        "ddp": _DDP,
    }
    return makers[name](path)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over all tokens but each row's first, as transformers has it."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


class _Ours:
    def __init__(self, path: str, **mesh: int) -> None:
        import autodist_fx as adx

        optimizer = functools.partial(torch.optim.AdamW, lr=LEARNING_RATE, fused=True)
        self._engine = adx.train(path, **mesh, optimizer=optimizer, verify=False, device="cpu")

    def step(self, ids: Tensor) -> float:
        return self._engine.step({"input_ids": ids, "labels": ids}).loss


class _TransformersTP:
    """transformers' own tensor parallelism, and the step that its Trainer takes: loss, backward, optimizer."""

    def __init__(self, path: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", dtype=torch.float32).train()
        parameters = list(self._model.parameters())
        split = [p for p in parameters if isinstance(p, DTensor)]  # the fused step takes no others along with them
        whole = [p for p in parameters if not isinstance(p, DTensor)]
        self._optimizers = [_adamw(each) for each in (split, whole) if each]

    def step(self, ids: Tensor) -> float:
        loss = self._model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return float(loss)


class _Copy(torch.autograd.Function):
    """Lets what all ranks have into products that each has a part of: their gradients add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient


class _Sum(torch.autograd.Function):
    """Each rank's part of a sum becomes the sum, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


class _Row(nn.Module):
    """This rank's input features of a linear, and the sum over ranks."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().chunk(2, dim=1)[rank].contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return _Sum.apply(F.linear(x, self.weight))


class _Vocabulary(nn.Module):
    """This rank's rows of the embedding."""

    def __init__(self, embedding: nn.Embedding, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(embedding.weight.detach().chunk(2, dim=0)[rank].clone())
        self.start = rank * self.weight.shape[0]

    def forward(self, ids: Tensor) -> Tensor:
        local = ids - self.start
        theirs = (local < 0) | (local >= self.weight.shape[0])
        found = F.embedding(local.masked_fill(theirs, 0), self.weight)
        return _Sum.apply(found.masked_fill(theirs.unsqueeze(-1), 0.0))


class _MegatronTP:
    """A split by hand, with the loss over a vocabulary that the ranks share: no rank has all logits."""

    def __init__(self, path: str) -> None:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                column(linear, rank, 2)
                linear.weight.requires_grad_(True)
            attention.o_proj, mlp.down_proj = _Row(attention.o_proj, rank), _Row(mlp.down_proj, rank)
            attention.register_forward_pre_hook(_copied, with_kwargs=True)
            mlp.register_forward_pre_hook(_copied, with_kwargs=True)
        model.model.embed_tokens = _Vocabulary(model.model.embed_tokens, rank)
        column(model.lm_head, rank, 2)
        model.lm_head.weight.requires_grad_(True)
        self._model, self._start = model, rank * model.lm_head.weight.shape[0]
        self._optimizer = _adamw(model.parameters())

    def step(self, ids: Tensor) -> float:
        hidden = self._model.model(input_ids=ids, use_cache=False)[0][:, :-1].flatten(0, 1)
        loss = self._shared_loss(self._model.lm_head(_Copy.apply(hidden)), ids[:, 1:].flatten())
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss)

    def _shared_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of `logits` [tokens, this rank's part of the vocabulary]."""
        most = logits.detach().amax(-1, keepdim=True)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        shifted = logits - most
        total = _Sum.apply(shifted.exp().sum(-1))
        local = labels - self._start
        theirs = (local < 0) | (local >= logits.shape[-1])
        chosen = shifted.gather(-1, local.masked_fill(theirs, 0).unsqueeze(-1)).squeeze(-1)
        return (total.log() - _Sum.apply(chosen.masked_fill(theirs, 0.0))).mean()


def _copied(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let what goes into a layer's part go in by _Copy."""
    if args:
        return (_Copy.apply(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": _Copy.apply(kwargs["hidden_states"])}


class _Stage(nn.Module):
    """Half of a Llama's layers, cut by hand."""

    def __init__(self, model: nn.Module, rank: int) -> None:
        super().__init__()
        middle = len(model.model.layers) // 2
        self.layers = model.model.layers[:middle] if rank == 0 else model.model.layers[middle:]
        self.embed = model.model.embed_tokens if rank == 0 else nn.Identity()
        self.end = nn.Identity() if rank == 0 else nn.Sequential(model.model.norm, model.lm_head)
        self.rotary = model.model.rotary_emb

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        positions = torch.arange(hidden.shape[1])[None]
        rotary = self.rotary(hidden, positions)
        for layer in self.layers:
            found = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
            hidden = found[0] if isinstance(found, tuple) else found
        return self.end(hidden)


class _Torch1F1B:
    """torch.distributed.pipelining's Schedule1F1B over stages that were cut by hand."""

    def __init__(self, path: str) -> None:
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        dist.init_process_group("gloo")
        self._rank = dist.get_rank()
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
        stage = _Stage(model, self._rank)
        self._schedule = Schedule1F1B(
            PipelineStage(stage, self._rank, 2, torch.device("cpu")), MICROBATCHES, loss_fn=_loss
        )
        self._optimizer = _adamw(stage.parameters())

    def step(self, ids: Tensor) -> float:
        losses: list[Tensor] = []
        if self._rank == 0:
            self._schedule.step(ids)
        else:
            self._schedule.step(target=ids, losses=losses)
        self._optimizer.step()
        self._optimizer.zero_grad()
        loss = torch.stack(losses).mean().detach() if losses else torch.zeros(())
        dist.all_reduce(loss)
        return float(loss)


class _DDP:
    """torch's DistributedDataParallel, half of the rows on each rank."""

    def __init__(self, path: str) -> None:
        dist.init_process_group("gloo")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
        self._model = nn.parallel.DistributedDataParallel(model)
        self._optimizer = _adamw(model.parameters())

    def step(self, ids: Tensor) -> float:
        own = ids.chunk(2)[dist.get_rank()]
        loss = self._model(input_ids=own, labels=own, use_cache=False).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        mean = loss.detach() / 2
        dist.all_reduce(mean)
        return float(mean)
