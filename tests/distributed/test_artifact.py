"""Artifacts and the cache over real processes: no tracing, no model code, the tokens of one process."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import autodist_fx as adx
from autodist_fx.cli.main import main
from tests.distributed.generate_worker import PROMPT, auto_class, results
from tests.support.checkpoint import save_tiny
from tests.support.processes import CLI, ENV, WORKERS, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def start(directory, ranks, *arguments):
    """Each rank's results and what it says."""
    directory.mkdir()
    what, source, *rest = arguments
    run_ranks(ranks, WORKERS / "artifact_worker.py", what, source, directory, *rest, ADX_CACHE="0")
    found = [torch.load(directory / f"{rank}.pt") for rank in range(ranks)]
    return found, [json.loads((directory / f"{rank}.json").read_text()) for rank in range(ranks)]


def assert_same(found, expected):
    for of_rank in found:
        for name, wanted in expected.items():
            if "logits" in name:
                torch.testing.assert_close(of_rank[name], wanted, rtol=1e-4, atol=1e-5)
            else:
                assert of_rank[name].tolist() == wanted.tolist(), name


def test_ranks_start_from_an_artifact_without_the_checkpoint_or_model_code(tmp_path):
    checkpoint = save_tiny(tmp_path / "llama", "llama", num_hidden_layers=3, tie_word_embeddings=True)
    model = auto_class(checkpoint).from_pretrained(checkpoint).eval()
    compiled = adx.compile(model, tp=2, pp=2)
    compiled.simulate(input_ids=PROMPT)  # a call without a mask has a variant of its own, which is saved along
    compiled.save(tmp_path / "artifact")
    shutil.rmtree(checkpoint)
    found, _ = start(tmp_path / "out", 4, "load", tmp_path / "artifact")
    assert_same(found, results(model))


def test_ranks_fill_the_cache_and_start_from_it(tmp_path):
    checkpoint = save_tiny(tmp_path / "gpt2", "gpt2")
    expected = results(auto_class(checkpoint).from_pretrained(checkpoint).eval())
    arguments = ("cache", checkpoint, tmp_path / "cache", 2, 1)
    for name in ("first", "second"):
        found, said = start(tmp_path / name, 2, *arguments)
        assert_same(found, expected)
        assert [s["warnings"] for s in said] == [[], []]
    (entry,) = (tmp_path / "cache").iterdir()
    made = (entry / "manifest.json").stat().st_mtime_ns
    weights = entry / "weights" / "rank1.safetensors"  # which rank 1 alone reads
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    found, said = start(tmp_path / "third", 2, *arguments)
    assert_same(found, expected)
    assert "weights/rank1.safetensors is not what was written" in said[0]["warnings"][0]
    assert (entry / "manifest.json").stat().st_mtime_ns != made  # made again
    assert list((tmp_path / "cache").iterdir()) == [entry]


def test_the_command_line(tmp_path, capsys, monkeypatch):
    checkpoint = save_tiny(tmp_path / "llama", "llama")
    rest = ["--prompt", "w5 w6 w7", "--max-new-tokens", "6", "--json", "--device", "cpu", "--no-do-sample"]
    answers = []

    def run(*arguments):
        environment = {**ENV, "ADX_CACHE": str(tmp_path / "cache")}
        done = subprocess.run([*CLI, *arguments, *rest], env=environment, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout)["answers"])

    monkeypatch.setenv("ADX_CACHE", str(tmp_path / "cache"))
    assert main(["run", "--model", str(checkpoint), "--tp", "1", "--no-cache", *rest]) == 0
    answers.append(json.loads(capsys.readouterr().out)["answers"])
    assert not (tmp_path / "cache").exists()
    run("--model", str(checkpoint), "--tp", "2")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert main(["compile", "--model", str(checkpoint), "--tp", "2", "--out", str(tmp_path / "artifact")]) == 0
    assert "LlamaForCausalLM on tp=2 x pp=1: " in capsys.readouterr().out
    shutil.rmtree(checkpoint)
    run("--artifact", str(tmp_path / "artifact"))
    assert answers[1:] == answers[:1] * 2
    assert main(["run", "--artifact", str(tmp_path / "artifact"), "--model", "x", "--prompt", "w5"]) == 2
    assert "leave --model out" in capsys.readouterr().err
    assert main(["run", "--artifact", str(Path("/nowhere")), "--prompt", "w5"]) == 2
    assert "/nowhere is no artifact" in capsys.readouterr().err
