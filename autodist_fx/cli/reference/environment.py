"""Lists the environment variables that the command line reads, for the man page and the reference."""

from __future__ import annotations

ENVIRONMENT = (
    ("ADX_CACHE", "where splits are kept: a directory, 1 for HF_HOME/autodist_fx, or 0 for nowhere (run: 1)"),
    ("ADX_HARDWARE", "what plans are predicted for: a preset's name or a file, before what was measured here"),
    ("CUDA_VISIBLE_DEVICES", "the devices that ranks may use, one each"),
    ("HF_HOME", "where downloads and splits are kept (~/.cache/huggingface)"),
    ("HF_HUB_OFFLINE", "1: nothing is downloaded"),
    ("NO_COLOR", "set: no colours, also in a terminal; elsewhere there are none"),
    ("OMP_NUM_THREADS", "threads of each rank on a CPU (the cores, shared out)"),
    ("RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT", "set by torchrun: this process is one of its ranks"),
)
