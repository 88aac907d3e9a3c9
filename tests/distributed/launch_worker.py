"""launch_local, as a command: `launch_worker.py WORLD_SIZE WORKER ARGUMENT...`"""

import sys
from pathlib import Path

from autodist_fx.runtime.comm.launch import launch_local

worker = str(Path(__file__).parent / sys.argv[2])
sys.exit(launch_local([sys.executable, worker, *sys.argv[3:]], int(sys.argv[1])))
