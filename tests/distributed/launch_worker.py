"""launch_local, as a command: `launch_worker.py [--fork] WORLD_SIZE WORKER ARGUMENT...`

--fork: as `autodist-fx run` starts ranks on the CPU, after this process has imported torch.
"""

import runpy
import sys
from pathlib import Path

from autodist_fx.runtime.comm.launch import launch_local

forks, (size, name, *arguments) = sys.argv[1] == "--fork", [a for a in sys.argv[1:] if a != "--fork"]
worker = str(Path(__file__).parent / name)


def forked() -> int:
    sys.argv = [worker, *arguments]
    runpy.run_path(worker, run_name="__main__")
    from autodist_fx.runtime.comm.process_group import leave

    leave()
    return 0


if forks:
    import torch

    from autodist_fx.runtime.comm import process_group  # noqa: F401  the imports that forks are spared

    torch.set_num_threads(1)
sys.exit(launch_local([sys.executable, worker, *arguments], int(size), forked=forked if forks else None))
