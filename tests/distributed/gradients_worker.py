"""One rank of a backward pass over Gloo, against the model's own gradients. `gradients_worker.py`, on 4 ranks."""


import torch

import autodist_fx as adx
from autodist_fx.runtime.comm.join_options import JoinOptions
from autodist_fx.runtime.comm.process_group import join, leave
from autodist_fx.simulation.backward import rank_gradients
from autodist_fx.weights.load import load_rank
from autodist_fx.weights.sources.module_source import ModuleSource
from cost_model.mesh import Mesh
from tests.support.models import padded_batch, tiny_model

# norms of heads (sums over tp), two KV heads on two ranks each, a tied embedding (sums over stages)
model = tiny_model("qwen3", num_key_value_heads=1, tie_word_embeddings=True)
ids, mask = padded_batch()
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(mask), "labels": ids}
model(**inputs).loss.backward()
wanted = dict(model.named_parameters(remove_duplicate=False))

me = join(Mesh(tp=2, pp=2), JoinOptions(device="cpu", timeout=60))
compiled = adx.compile(model, tp=2, pp=2, train=True, input_names=tuple(inputs), verify=me.rank == 0)
program = compiled.program(me.rank)
load_rank(program, ModuleSource(model), buffers=compiled.buffers, base_model_prefix=model.base_model_prefix)
program.graph_module.eval()
loss, gradients = rank_gradients(program, inputs, me.communicator)
assert (loss is not None) == (program.stage == 1)
assert gradients.keys() == dict(program.graph_module.named_parameters()).keys()
assert program.grad_sums
for path, gradient in gradients.items():
    shard = program.param_shards[path]
    own = wanted[shard.source].grad
    if shard.dim is not None:
        own = torch.cat([own.narrow(shard.dim, a, b - a) for a, b in shard.intervals], shard.dim)
    error = float((gradient - own).abs().max() / wanted[shard.source].grad.abs().max())
    assert error <= 1e-6, (path, error)  # the model casts to float32 inside
me.communicator.finish_sends()
leave()
if me.rank == 0:
    print("all well")
