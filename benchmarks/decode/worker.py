"""One rank of one checkout for `decode/against.py`: loads the model, then decodes on command.

worker.py CHECKOUT MODEL TPxPP ROWS PROMPT_TOKENS; CHECKOUT stands first in PYTHONPATH.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import answer, serve


class DecodeWorker:
    """The commands that against.py gives."""

    def build(self, checkout: str, path: str, mesh: str, rows: int, prompt: int) -> dict[str, Any]:
        import autodist_fx as adx

        found = Path(adx.__file__).resolve().parents[1]
        assert found == Path(checkout).resolve(), f"autodist_fx is {found}'s, not {checkout}'s"
        tp, pp = (int(n) for n in mesh.split("x"))
        self.model = adx.from_pretrained(path, tp=tp, pp=pp)
        generator = torch.Generator().manual_seed(1)
        self.input_ids = torch.randint(0, 32000, (rows, prompt), generator=generator)
        return {}

    @torch.no_grad()
    def decode(self, new_tokens: int) -> dict[str, Any]:
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        tokens = self.model.generate(
            input_ids=self.input_ids,
            attention_mask=torch.ones_like(self.input_ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": tokens[:, self.input_ids.shape[1] :].flatten().tolist()}


def main() -> None:
    """`worker.py CHECKOUT MODEL TPxPP ROWS PROMPT_TOKENS`"""
    worker, (checkout, path, mesh, rows, prompt) = DecodeWorker(), sys.argv[1:]
    answer(worker.build, checkout=checkout, path=path, mesh=mesh, rows=int(rows), prompt=int(prompt))
    serve({"decode": worker.decode})


if __name__ == "__main__":
    main()
