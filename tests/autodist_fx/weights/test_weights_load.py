"""load_rank: the rank's module gets its slices, ties stay ties, and what is missing is named."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import fx, nn
from transformers import AutoModelForCausalLM, GPT2Config

from autodist_fx.errors import CheckpointError
from autodist_fx.weights.load import load_rank
from autodist_fx.weights.names import resolve_names
from autodist_fx.weights.sources.module_source import ModuleSource
from autodist_fx.weights.sources.safetensors_source import SafetensorsSource
from cost_model.mesh import Mesh
from passes.program.param_shard import ParamShard
from passes.program.rank_program import RankProgram


def program_of(shards: list[ParamShard], tied: tuple[tuple[str, str], ...] = ()) -> RankProgram:
    """A rank whose module holds the shards' parameters, on meta; of each pair in `tied`, the second is the first."""
    root = nn.Module()
    for shard in shards:
        path, _, leaf = shard.name.rpartition(".")
        owner = root
        for part in filter(None, path.split(".")):
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]
        tensor = torch.empty(shard.local_shape, dtype=getattr(torch, shard.dtype), device="meta")
        if shard.is_buffer:
            owner.register_buffer(leaf, tensor, persistent=False)
        else:
            owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    for first, second in tied:
        path, _, leaf = second.rpartition(".")
        setattr(root.get_submodule(path), leaf, root.get_parameter(first))
    module = fx.GraphModule(root, fx.Graph())
    for name, child in root.named_children():  # fx keeps only what its graph uses
        module.add_module(name, child)
    for name, parameter in root.named_parameters(recurse=False):
        module.register_parameter(name, parameter)
    return RankProgram(0, Mesh(2, 1), module, (), {s.name: s for s in shards}, ())


def tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


STATE = {
    "embed.weight": tensor(10, 4),
    "layer.q.weight": tensor(6, 4, seed=1),
    "layer.o.weight": tensor(4, 6, seed=2),
    "norm.weight": tensor(4, seed=3),
}
SHARDS = [
    ParamShard("embed.weight", "embed.weight", (10, 4), "float32", 0, ((5, 10),)),
    ParamShard("q.weight", "layer.q.weight", (6, 4), "float32", 0, ((0, 2), (4, 5))),
    ParamShard("o.weight", "layer.o.weight", (4, 6), "float32", 1, ((0, 2), (4, 5))),
    ParamShard("norm.weight", "norm.weight", (4,), "float32"),
]


def test_every_parameter_gets_its_slice(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    program, seen = program_of(SHARDS), []
    report = load_rank(program, SafetensorsSource(tmp_path), progress=lambda done, whole: seen.append((done, whole)))
    held = dict(program.graph_module.named_parameters())
    assert torch.equal(held["embed.weight"], STATE["embed.weight"][5:])
    assert torch.equal(held["q.weight"], STATE["layer.q.weight"][[0, 1, 4]])
    assert torch.equal(held["o.weight"], STATE["layer.o.weight"][:, [0, 1, 4]])
    assert torch.equal(held["norm.weight"], STATE["norm.weight"])
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in held.values())
    assert report.shard_bytes == report.bytes_read == 4 * (20 + 12 + 12 + 4) == program.weight_bytes
    assert report.checkpoint_bytes == 4 * (40 + 24 + 24 + 4)
    assert report.seconds > 0 and report.peak_rss_bytes >= report.rss_before_bytes > 0
    assert seen[-1] == (report.shard_bytes, report.shard_bytes)
    assert [done for done, _ in seen] == [80, 128, 176, 192]  # the largest first


def test_dtype_and_requires_grad():
    program = program_of([*SHARDS, ParamShard("ids", "ids", (3,), "int64")])
    state = {**STATE, "ids": torch.tensor([1, 2, 3])}
    report = load_rank(program, ModuleSource(state), dtype=torch.bfloat16, requires_grad=False)
    held = dict(program.graph_module.named_parameters())
    assert held["ids"].dtype == torch.int64
    assert all(p.dtype == torch.bfloat16 for name, p in held.items() if name != "ids")
    assert not any(p.requires_grad for p in held.values())
    assert report.shard_bytes == 2 * 48 + 24 and report.bytes_read == 4 * 48 + 24


def test_one_source_and_slice_is_one_parameter():
    head = ParamShard("head.weight", "embed.weight", (10, 4), "float32", 0, ((5, 10),))
    for tied in ((), (("embed.weight", "head.weight"),)):  # also where the passes made two of them
        program = program_of([*SHARDS, head], tied)
        report = load_rank(program, ModuleSource(STATE))
        module = program.graph_module
        assert module.get_parameter("head.weight") is module.get_parameter("embed.weight")
        assert report.shard_bytes == report.bytes_read == 4 * 48


def test_a_tied_name_that_the_checkpoint_lacks():
    head = ParamShard("head.weight", "head.weight", (10, 4), "float32", 0, ((5, 10),))
    program = program_of([*SHARDS, head])
    load_rank(program, ModuleSource(STATE), tied=[("embed.weight", "head.weight")])
    module = program.graph_module
    assert module.get_parameter("head.weight") is module.get_parameter("embed.weight")
    with pytest.raises(CheckpointError, match=r"1 of 5 tensors are not in the checkpoint: head\.weight"):
        load_rank(program_of([*SHARDS, head]), ModuleSource(STATE))


def test_other_slices_of_one_source_stay_apart():
    other = ParamShard("copy.weight", "embed.weight", (10, 4), "float32", 0, ((0, 5),))
    program = program_of([*SHARDS, other])
    load_rank(program, ModuleSource(STATE))
    assert torch.equal(program.graph_module.get_parameter("copy.weight"), STATE["embed.weight"][:5])


def test_missing_tensors_are_named():
    state = {"embed.weight": STATE["embed.weight"]}
    with pytest.raises(CheckpointError, match=r"3 of 4 tensors.*layer\.q\.weight, layer\.o\.weight, norm\.weight"):
        load_rank(program_of(SHARDS), ModuleSource(state))


def test_a_checkpoint_of_another_shape():
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \[5\] in the checkpoint and \[4\] in the model"):
        load_rank(program_of(SHARDS), ModuleSource({**STATE, "norm.weight": tensor(5)}))


def test_buffers_come_from_the_mapping_and_keep_their_dtype():
    freq = ParamShard("rope.inv_freq", "rope.inv_freq", (4,), "float32", is_buffer=True)
    with pytest.raises(CheckpointError, match=r"neither in the checkpoint nor given: rope\.inv_freq"):
        load_rank(program_of([*SHARDS, freq]), ModuleSource(STATE))
    given = tensor(4, seed=9)
    program = program_of([*SHARDS, freq])
    # Old checkpoints carry such buffers, in any precision: the given values count.
    source = ModuleSource({**STATE, "rope.inv_freq": torch.zeros(4)})
    report = load_rank(program, source, dtype=torch.bfloat16, buffers={"rope.inv_freq": given})
    held = program.graph_module.get_buffer("rope.inv_freq")
    assert torch.equal(held, given) and held.data_ptr() != given.data_ptr()
    assert report.bytes_read == 4 * 48  # nothing for the buffer


def test_a_persistent_buffer_comes_from_the_checkpoint_in_slices():
    mean = ParamShard("bn.mean", "bn.mean", (6,), "float32", 0, ((3, 6),), is_buffer=True)
    program = program_of([*SHARDS, mean])
    load_rank(program, ModuleSource({**STATE, "bn.mean": torch.arange(6.0)}))
    assert program.graph_module.get_buffer("bn.mean").tolist() == [3, 4, 5]


def test_meta_tensors_that_no_shard_knows_are_refused():
    program = program_of(SHARDS)
    program.param_shards = {name: s for name, s in program.param_shards.items() if name != "o.weight"}
    with pytest.raises(CheckpointError, match=r"o\.weight on the meta device"):
        load_rank(program, ModuleSource(STATE))


@pytest.mark.parametrize(
    ("wanted", "available", "options", "expected"),
    [
        ("a.w", ["a.w"], {}, "a.w"),
        ("transformer.h.0.w", ["h.0.w"], {"base_model_prefix": "transformer"}, "h.0.w"),
        ("h.0.w", ["transformer.h.0.w"], {"base_model_prefix": "transformer"}, "transformer.h.0.w"),
        ("h.0.w", ["transformer.h.0.w"], {}, None),
        ("ln.LayerNorm.weight", ["ln.LayerNorm.gamma"], {}, "ln.LayerNorm.gamma"),
        ("bert.ln.LayerNorm.bias", ["ln.LayerNorm.beta"], {"base_model_prefix": "bert"}, "ln.LayerNorm.beta"),
        ("conv.parametrizations.weight.original0", ["conv.weight_g"], {}, "conv.weight_g"),
        ("lm.x.w", ["language_model.x.w"], {"key_mapping": {"^language_model": "lm"}}, "language_model.x.w"),
        ("head.w", ["wte.w"], {"tied": [("transformer.wte.w", "head.w")], "base_model_prefix": "transformer"}, "wte.w"),
        ("head.w", ["wte.w", "head.w"], {"tied": [("wte.w", "head.w")]}, "wte.w"),  # the owner of a tie wins
        ("wte.w", ["head.w"], {"tied": [("wte.w", "head.w")]}, "head.w"),
        ("gone", ["a"], {"base_model_prefix": "m"}, None),
    ],
)
def test_names(wanted, available, options, expected):
    assert resolve_names([wanted], available, **options).get(wanted) == expected


TINY_GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=50, n_positions=32)


@pytest.mark.parametrize("base_only", [False, True], ids=["task", "base"])
def test_a_tied_gpt2_saved_by_transformers(tmp_path, base_only):
    model = AutoModelForCausalLM.from_config(TINY_GPT2)
    (model.transformer if base_only else model).save_pretrained(tmp_path)
    source = SafetensorsSource(tmp_path)
    assert ("wte.weight" in source.names()) == base_only and "lm_head.weight" not in source.names()
    whole = {name: p for name, p in model.named_parameters(remove_duplicate=False)}
    shards = [ParamShard(name, name, tuple(p.shape), "float32") for name, p in whole.items()]
    program = program_of(shards)
    load_rank(
        program,
        source,
        base_model_prefix=model.base_model_prefix,
        tied=[("transformer.wte.weight", "lm_head.weight")],
    )
    held = dict(program.graph_module.named_parameters(remove_duplicate=False))
    assert held.keys() == whole.keys() and all(torch.equal(held[name], whole[name]) for name in whole)
    assert held["lm_head.weight"] is held["transformer.wte.weight"]
