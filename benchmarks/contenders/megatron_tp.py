"""A split as an expert writes it by hand: the transformers model with its linears sliced as Megatron does.

Every layer costs two all_reduce, in place on the row-parallel outputs. Embedding and head are split over the
vocabulary; greedy decoding never gathers logits, only each rank's best (value, token).
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache


def column(linear: nn.Linear, rank: int, world_size: int) -> None:
    """Keep this rank's output features; heads stay whole because head counts divide here."""
    linear.weight = nn.Parameter(linear.weight.chunk(world_size, dim=0)[rank].clone(), requires_grad=False)


class RowLinear(nn.Module):
    """This rank's input features, and the sum over ranks."""

    def __init__(self, linear: nn.Linear, rank: int, world_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.chunk(world_size, dim=1)[rank].contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        dist.all_reduce(y)
        return y


class VocabEmbedding(nn.Module):
    """This rank's rows of the table; tokens of the other ranks give zeros, and the sum over ranks puts it together."""

    def __init__(self, embedding: nn.Embedding, rank: int, world_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(embedding.weight.chunk(world_size, dim=0)[rank].clone(), requires_grad=False)
        self.start = rank * self.weight.shape[0]

    def forward(self, ids: Tensor) -> Tensor:
        local = ids - self.start
        theirs = (local < 0) | (local >= self.weight.shape[0])
        y = F.embedding(local.masked_fill(theirs, 0), self.weight).masked_fill_(theirs.unsqueeze(-1), 0.0)
        dist.all_reduce(y)
        return y


class MegatronContender:
    """The split model, with a decoding loop of its own: `generate`'s bookkeeping costs and gives nothing here."""

    def __init__(self, model: nn.Module, rank: int, world_size: int) -> None:
        self.model, self.rank, self.world_size = model.eval(), rank, world_size
        self.vocab_start = rank * model.lm_head.weight.shape[0]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        local = self.forward_sharded(input_ids, attention_mask)
        parts = [torch.empty_like(local) for _ in range(self.world_size)]
        dist.all_gather(parts, local)
        return torch.cat(parts, dim=-1)

    def forward_sharded(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        return self.model.lm_head(hidden)

    def decode(self, input_ids: Tensor, attention_mask: Tensor, new_tokens: int) -> Tensor:
        cache = DynamicCache(config=self.model.config)
        tokens, step_ids = [input_ids], input_ids
        for _ in range(new_tokens):
            hidden = self.model.model(
                input_ids=step_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True
            )[0]
            step_ids = self._argmax(self.model.lm_head(hidden[:, -1]))
            tokens.append(step_ids)
            attention_mask = F.pad(attention_mask, (0, 1), value=1)
        return torch.cat(tokens, dim=1)

    def _argmax(self, local_logits: Tensor) -> Tensor:
        """Best token over all vocabulary shards: [batch, 1]."""
        value, index = local_logits.max(dim=-1)
        mine = torch.stack([value.double(), (index + self.vocab_start).double()])  # double holds every token id
        parts = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(parts, mine)
        values, indices = torch.stack(parts).unbind(1)  # [rank, batch] each
        return indices.gather(0, values.argmax(0, keepdim=True)).long().T


def build(path: str) -> MegatronContender:
    """Load whole, then slice: loading is not what this contender is measured for."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            column(linear, rank, world_size)
        attention.o_proj = RowLinear(attention.o_proj, rank, world_size)
        mlp.down_proj = RowLinear(mlp.down_proj, rank, world_size)
    model.model.embed_tokens = VocabEmbedding(model.model.embed_tokens, rank, world_size)
    column(model.lm_head, rank, world_size)
    return MegatronContender(model, rank, world_size)
