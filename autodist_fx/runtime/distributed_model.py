"""`DistributedModel`: one rank's share of a model that is called and does not generate (encoders, classifiers ...)."""

from __future__ import annotations

from typing import Any, NoReturn

from autodist_fx.calls.call import by_name, read_call
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.generation.collective_call import collective
from autodist_fx.runtime.generation.guarded_programs import GuardedPrograms
from autodist_fx.runtime.generation.step_runner import RunnerParts, StepRunner
from autodist_fx.runtime.microbatches.count import Microbatches


class DistributedModel(StepRunner):
    """The model that `adx.from_pretrained` and `adx.compile(...).to_distributed()` return, on every rank, where it does
    not generate, or cannot over ranks. `no_generate` says why, in a sentence."""

    def __init__(
        self, parts: RunnerParts, programs: GuardedPrograms[Any], no_generate: str, main_input_name: str
    ) -> None:
        super().__init__(parts, programs)
        self.no_generate = no_generate
        self.main_input_name = main_input_name

    def can_generate(self) -> bool:
        """Return False, which transformers asks."""
        return False

    @collective
    def forward(self, *args: Any, microbatches: Microbatches | None = None, **kwargs: Any) -> Any:
        """Run one forward pass; called on every rank with the same arguments.

        Takes what the model's own forward takes, and returns what that returns, on every rank. A call unlike those
        before is compiled first. `microbatches`: into how many parts its rows are divided on pp > 1, where that is not
        the attribute's. Raises AutodistError for an argument that there can be no program for, and for a cache.
        """
        assert self._call_programs is not None
        signature = self._call_programs.signature
        given = {name: value for name, value in kwargs.items() if value is not None}
        call = read_call(signature, by_name(signature.argument_names, args, given), {})
        if call.use_cache:
            raise AutodistError(f"this model runs without a cache, use_cache=False: {self.no_generate}")
        return self._run_call(self._call_programs, call, microbatches)

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise AutodistError, which says why the model does not generate over ranks."""
        raise AutodistError(f"{self.no_generate}: over ranks it is called, model(...), and generates nothing")
