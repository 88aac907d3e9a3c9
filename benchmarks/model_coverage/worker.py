"""A process that checks one type after the other: jobs come in as lines of JSON on stdin, results go out on stdout.

One process for many types, so that torch and transformers are imported once. What models print goes to stderr.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import warnings


def main() -> None:
    memory_bytes = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")

    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    from model_coverage.check import check_type

    def answer(kind: str, value: object) -> None:
        answers.write(json.dumps({kind: value}) + "\n")

    answer("ready", None)
    for line in sys.stdin:
        job = json.loads(line)
        meshes = [tuple(mesh) for mesh in job["meshes"]]
        result = check_type(
            job["task"],
            job["type"],
            meshes,
            seconds=job["seconds"],
            so_far=lambda partial: answer("partial", partial),
            sweeps=job["sweeps"],
            sweep_meshes=[tuple(mesh) for mesh in job["sweep_meshes"]],
        )
        answer("result", result)


if __name__ == "__main__":
    main()
