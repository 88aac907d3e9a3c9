"""`CompileOptions`: chooses the variant to trace and the use of its programs. `PlanOptions` chooses how to split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """The options of `compile` that do not concern the split; see `autodist_fx.compile`.

    use_cache, input_names, concrete_args: choose the variant to trace (`autodist_fx.tracing.trace`); input_names None:
    the usual inputs.
    train: programs carry what a backward pass needs. in_parts: they run on parts of a batch, whose losses add up to the
    whole batch's (passes.losses.divide_losses.py), and return nothing else.
    verify: they are proven before they are used.
    dump_dir: gets every rank's graph after each pass, as text. verbose: what each pass did is printed.
    """

    use_cache: bool = False
    input_names: tuple[str, ...] | None = None
    concrete_args: tuple[tuple[str, object], ...] = ()
    train: bool = False
    verify: bool = True
    dump_dir: str | Path | None = None
    verbose: bool = False
    in_parts: bool = False

    @classmethod
    def from_keywords(
        cls,
        *,
        use_cache: bool = False,
        input_names: Sequence[str] | None = None,
        concrete_args: Mapping[str, object] | None = None,
        train: bool = False,
        verify: bool = True,
        dump_dir: str | Path | None = None,
        verbose: bool = False,
    ) -> CompileOptions:
        """Build options from the keywords of the public functions."""
        return cls(
            use_cache=use_cache,
            input_names=None if input_names is None else tuple(input_names),
            concrete_args=tuple((concrete_args or {}).items()),
            train=train,
            verify=verify,
            dump_dir=dump_dir,
            verbose=verbose,
        )
