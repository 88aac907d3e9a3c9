"""One rank ends; within 15 seconds every other one has ended too, not with 0, and has said which rank it was."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.processes import ENV, WORKERS, free_port

pytestmark = pytest.mark.distributed
WORKER = str(WORKERS / "sleeper_worker.py")
SECONDS = 15


def start(command, **env):
    env = {**ENV, **env}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    # A shell has its background jobs ignore Ctrl-C, and their children with them: tests that run in one, too.
    return subprocess.Popen(command, env=env, preexec_fn=_hears_ctrl_c, **pipes)


def _hears_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def launched(world_size, what):
    """The command line's own launcher."""
    return [start([sys.executable, str(WORKERS / "launch_worker.py"), str(world_size), WORKER, str(world_size), what])]


def forked(world_size, what):
    """The launcher, by forks of itself: what `autodist-fx run` does on the CPU."""
    worker = str(WORKERS / "launch_worker.py")
    return [start([sys.executable, worker, "--fork", str(world_size), WORKER, str(world_size), what])]


def torchrun(world_size, what):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world_size)]
    return [start([*command, "--master-port", str(free_port()), WORKER, str(world_size), what])]


def terminals(world_size, what):
    """Every rank started by itself."""
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    command = [sys.executable, WORKER, str(world_size), what]
    return [start(command, RANK=str(rank), **shared) for rank in range(world_size)]


def pids(processes, world_size):
    """By rank; returns when all are there."""
    found = {}
    for process in processes:
        while len(found) < world_size and (line := process.stderr.readline()):
            matches = re.findall(r"pid (\d+) rank (\d+)", line)  # two ranks may have written into one line
            found |= {int(rank): int(pid) for pid, rank in matches}
            if matches and len(processes) > 1:
                break
    assert sorted(found) == list(range(world_size))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    ("how", "ranks", "dead"), [(launched, 2, 1), (forked, 3, 1), (torchrun, 2, 1), (terminals, 2, 0), (terminals, 3, 1)]
)
def test_kill_9(how, ranks, dead):
    kill_one(how, ranks, dead, "talk")


@pytest.mark.slow
def test_kill_9_while_groups_of_rows_are_in_flight():
    kill_one(terminals, 2, 0, "groups")


def kill_one(how, ranks, dead, what):
    processes = how(ranks, what)
    try:
        ranks = pids(processes, ranks)
        time.sleep(0.5)  # in the middle of it
        os.kill(ranks[dead], signal.SIGKILL)
        deadline = time.monotonic() + SECONDS
        said = [p.communicate(timeout=max(0.1, deadline - time.monotonic()))[1] for p in processes]
        assert not any(alive(pid) for pid in ranks.values())
        assert all(p.returncode != 0 for p in processes)
        for rank in set(ranks) - {dead}:
            assert f"rank {dead} died without a word (killed, out of memory, or crashed); rank {rank} ends" in "".join(
                said
            )
        if how in (launched, forked):
            assert f"rank {dead} was killed by signal 9 (SIGKILL); all ranks ended" in said[0]
            assert processes[0].returncode == 137
    finally:
        for process in processes:
            process.kill()


def run(what, how=launched):
    [launcher] = how(2, what)
    _, said = launcher.communicate(timeout=90)
    return launcher.returncode, said


@pytest.mark.parametrize("how", [launched, forked])
def test_a_rank_that_raises(how):
    code, said = run("raise", how)
    assert code == 1
    assert "rank 1 failed: ArithmeticError: no such number; rank 0 ends with it" in said
    assert "rank 1 failed with exit code 1; all ranks ended" in said


def test_a_rank_that_says_nothing_for_too_long():
    code, said = run("silent", forked)
    assert code == 1
    assert re.search(r"all_reduce of float32\[64\] with rank 1 failed: Timed out", said)


def test_a_good_end_is_no_death():
    code, said = run("finish", forked)
    assert code == 0
    assert "ends with it" not in said


@pytest.mark.parametrize("how", [launched, forked])
def test_the_launchers_death_ends_the_ranks(how):
    [launcher] = how(2, "talk")
    ranks = pids([launcher], 2)
    launcher.kill()
    deadline = time.monotonic() + SECONDS
    while any(alive(pid) for pid in ranks.values()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in ranks.values())


def test_ctrl_c_ends_the_ranks():
    [launcher] = forked(2, "talk")
    ranks = pids([launcher], 2)
    launcher.send_signal(signal.SIGINT)
    _, said = launcher.communicate(timeout=SECONDS)
    assert launcher.returncode == 130 and said == "interrupted; all ranks ended\n"
    assert not any(alive(pid) for pid in ranks.values())
