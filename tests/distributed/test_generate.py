"""Real processes over Gloo: the tokens of transformers' own generate in one process, on every rank."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.distributed.generate_worker import auto_class, results
from tests.support.checkpoint import save_tiny
from tests.support.processes import CLI, ENV, WORKERS, free_port, run_ranks
from tests.support.seq2seq import tiny_seq2seq

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    # 6 heads in 3 groups, which 2 ranks share as 2 + 1; tied, so that two stages hold the embedding
    changes = {"num_hidden_layers": 3, "tie_word_embeddings": True, "max_position_embeddings": 100_000}
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama", **changes)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    directory = tmp_path_factory.mktemp("t5")
    model = tiny_seq2seq("t5", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2.0 if parameter.dim() > 1 else 1.0
    model.save_pretrained(directory)
    return directory


@pytest.mark.drawn(3)
@pytest.mark.parametrize(
    ("family", "tp", "pp", "how"),
    [("t5", 2, 1, "--memory"), ("t5", 2, 2, "")]
    + [("llama", 2, 1, "--memory"), ("gpt2", 1, 2, ""), ("llama", 2, 2, ""), ("gpt2", 2, 2, "")],
)
def test_same_tokens(family, tp, pp, how, request, tmp_path):
    checkpoint = request.getfixturevalue(family)
    worker = WORKERS / "generate_worker.py"
    arguments = [str(checkpoint), str(tp), str(pp), str(tmp_path), *how.split()]
    if (family, tp, pp) == ("gpt2", 1, 2):  # by torchrun itself
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run([*command, str(worker), *arguments], env=ENV, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        run_ranks(tp * pp, worker, *arguments)
    expected = results(auto_class(checkpoint).from_pretrained(checkpoint).eval())
    for rank in range(tp * pp):
        found = torch.load(tmp_path / f"{rank}.pt")
        loaded, whole = found.pop("loaded").tolist()
        assert loaded < whole  # each its own slices only
        assert len(found) == len(expected) * (2 if how else 1)
        for name, value in found.items():
            wanted = expected[name.removesuffix(" from memory")]
            if "logits" in name:
                torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)
            else:
                assert value.tolist() == wanted.tolist(), f"rank {rank}: {name}"


def test_the_command_line_starts_its_ranks(llama, tmp_path):
    (tmp_path / "prompts").write_text("w5 w6 w7\nw9\n")
    command = [*CLI, "--model", str(llama), "--batch-file", str(tmp_path / "prompts"), "--max-new-tokens", "6"]
    command += ["--json", "--device", "cpu", "--no-do-sample"]
    answers = []
    for mesh in ("--tp", "1"), ("--tp", "2"):
        done = subprocess.run([*command, *mesh], env=ENV, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout)["answers"])
    assert answers[0] == answers[1]


def test_a_rank_in_its_own_terminal_stops_at_a_breakpoint(llama):
    """breakpoint() in a pass, on one rank, which a person would look at for longer than any heartbeat."""
    port = str(free_port())
    argv = ["--model", str(llama), "--tp", "2", "--prompt", "w5 w6", "--max-new-tokens", "4", "--device", "cpu"]
    argv += ["--no-do-sample", "--world-size", "2", "--master-addr", "127.0.0.1", "--master-port", port]
    program = (
        "import sys\nimport passes.partition.pipeline as p\nfrom autodist_fx.cli.main import main\n"
        "run = p.localize_cache\n"
        "def stop(g, ctx, **kinds):\n    breakpoint()\n    return run(g, ctx, **kinds)\n"
        "if '1' == sys.argv[-1]: p.localize_cache = stop\n"
        "sys.exit(main(['run', *sys.argv[1:]]))"
    )
    terminals = [
        subprocess.Popen(
            [sys.executable, "-c", program, *argv, "--rank", str(rank)],
            env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = ""
        while "(Pdb) " not in said:
            character = terminals[1].stdout.read(1)
            assert character, terminals[1].communicate()[1]
            said += character
        time.sleep(3)
        assert all(terminal.poll() is None for terminal in terminals)
        second, _ = terminals[1].communicate("p 'rank', ctx.rank\nc\n", timeout=60)
        first, _ = terminals[0].communicate(timeout=60)
        assert [terminal.returncode for terminal in terminals] == [0, 0]
        assert "('rank', 1)" in second
        assert first.splitlines()[0].startswith("w") and first.splitlines()[0] in second
    finally:
        for terminal in terminals:
            terminal.kill()


def test_kill_9_in_the_middle_of_generation(llama):
    argv = ["--model", str(llama), "--tp", "2", "--prompt", "w5 w6", "--device", "cpu", "--no-do-sample"]
    argv += ["--max-new-tokens", "50000", "--min-new-tokens", "50000"]
    run = subprocess.Popen([*CLI, *argv], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert run.stdout.read(8).startswith("w")  # the first words are there: in the middle of it
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        ranks = {Path(f"/proc/{pid}/comm").read_text().strip(): int(pid) for pid in children}
        assert sorted(ranks) == ["rank 0", "rank 1"]  # as `top` shows them
        os.kill(ranks["rank 1"], signal.SIGKILL)
        _, said = run.communicate(timeout=15)
        assert run.returncode == 137
        assert "rank 1 died without a word (killed, out of memory, or crashed); rank 0 ends with it" in said
        assert "rank 1 was killed by signal 9 (SIGKILL); all ranks ended" in said
    finally:
        run.kill()
