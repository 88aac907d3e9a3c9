"""A process becomes a rank of an artifact: its program, weights, and what generates with them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from autodist_fx.artifact.manifest import (
    ArtifactError,
)
from autodist_fx.artifact.reader import MAKE_AGAIN, SAVE_SUCH, ArtifactReader
from autodist_fx.artifact.variant_format import Form
from autodist_fx.calls.input_spec import InputForm
from autodist_fx.calls.lengths import Lengths, another_way
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.agreement import digest
from autodist_fx.runtime.comm.join_options import JoinOptions
from autodist_fx.runtime.comm.process_group import JoinedRank, join
from autodist_fx.runtime.generation.causal_lm import DistributedCausalLM
from autodist_fx.runtime.generation.guarded_programs import GuardedPrograms
from autodist_fx.runtime.generation.two_graphs import TwoGraphCausalLM
from autodist_fx.weights.load import LoadReport
from autodist_fx.weights.process_memory import peak_rss_bytes, rss_bytes
from passes.fx.guards import Guards
from passes.program.rank_program import RankProgram

T = TypeVar("T")


def start_from_artifact(artifact: ArtifactReader, options: JoinOptions) -> DistributedCausalLM:
    """This process joins the ranks that the artifact is for, all of the same artifact, and takes its share."""
    asked = {"the function called": "load", "the artifact": digest(artifact.manifest.to_text())}
    joined = join(artifact.mesh, options, asked)
    return joined.together(lambda: (share(artifact, joined), {}))


def share(
    artifact: ArtifactReader,
    joined: JoinedRank,
    whole_sequences: Callable[[tuple[str, ...], RankProgram], GuardedPrograms[RankProgram]] | None = None,
    at_lengths: Callable[[Lengths, RankProgram], Any] | None = None,
) -> DistributedCausalLM:
    """The share of `joined`. What the artifact lacks is made by `whole_sequences(input_names, program)` and, of the
    graphs that generate, by `at_lengths(lengths, program)`, with the weights of `program`."""
    began, rss_before = time.perf_counter(), rss_bytes()
    form = artifact.generating_form()
    program = artifact.program(joined.rank, form.name, joined.device)

    more = None if at_lengths is None else lambda lengths: at_lengths(lengths, program)

    def mine(form: Form) -> RankProgram:
        return artifact.program(joined.rank, form.name, joined.device)

    def make_program(names: tuple[str, ...]) -> GuardedPrograms[RankProgram]:
        found = artifact.form_of_whole_sequences(names)
        if found is not None:
            return _ways(artifact, found, mine)
        if whole_sequences is not None:
            return whole_sequences(names, program)
        raise AutodistError(
            f"{artifact.directory} has no graph of whole sequences that takes {', '.join(names)} (it has "
            f"{artifact.described_forms()}): save one by calling simulate with them first, or use from_pretrained"
        )

    given = program, joined.communicator, artifact.config, artifact.generation_config
    if form.encoder:
        ways = _ways(artifact, form, lambda form: (mine(artifact.forms[form.encoder]), mine(form)), more)
        split = _with_encoder(artifact, given, ways, joined.device)
    elif form.phase:
        split = _with_own_cache(artifact, given, form, make_program, joined, more)
    else:
        split = TwoGraphCausalLM(
            *given, device=joined.device, make_program=make_program, ways=_ways(artifact, form, mine, more)
        )
    weights = artifact.weights_of(joined.rank, joined.device)
    split.plan = artifact.plan
    split.positions_follow_mask = artifact.model_fields["positions_follow_mask"]
    split.load_report = LoadReport(
        shard_bytes=sum(t.numel() * t.element_size() for t in weights.values()),
        bytes_read=artifact.manifest.files[f"weights/rank{joined.rank}.safetensors"].bytes,
        checkpoint_bytes=sum(r.bytes for n, r in artifact.manifest.files.items() if n.startswith("weights/")),
        seconds=time.perf_counter() - began,
        rss_before_bytes=rss_before,
        peak_rss_bytes=peak_rss_bytes(),
    )
    return split


def _ways(artifact: ArtifactReader, first: Form, run: Callable[[Form], T], more: Callable[[Lengths], Any] | None = None
) -> GuardedPrograms[T]:
    """What `run` makes of a form, and of those for the same call with other lengths; `more` makes others."""
    same = [f for f in artifact.forms.values() if f.same_call(first)]
    found = [(artifact.conditions_of(form), run(form)) for form in (first, *(f for f in same if f is not first))]
    dtypes = {name: getattr(torch, dtype, torch.long) for name, (_, dtype) in first.input_forms.items()}
    forms = {name: InputForm(dims, dtypes[name]) for name, (dims, _) in first.input_forms.items()}

    def refuse(lengths: Lengths) -> tuple[Guards | None, T]:
        lines = found[0][0].otherwise(lengths) if found[0][0] is not None else []
        raise AutodistError(another_way(artifact.manifest.model, lengths, lines) + SAVE_SUCH)

    return GuardedPrograms(found, more or refuse, forms)


def _with_encoder(
    artifact: ArtifactReader,
    given: tuple[Any, ...],
    ways: GuardedPrograms[tuple[RankProgram, RankProgram]],
    device: torch.device,
) -> DistributedCausalLM:
    from autodist_fx.runtime.generation.seq2seq_lm import DistributedSeq2SeqLM, seq2seq_class

    split_class, skeleton = DistributedSeq2SeqLM, None
    if artifact.model_fields["own_generate"]:  # a generate of the family's own, which is in the model's code
        from autodist_fx.tracing import class_for, empty_model

        split_class, skeleton = seq2seq_class(class_for(artifact.config)), empty_model(artifact.config)
    return split_class(
        *given,
        device=device,
        encoder=ways.found[0][1][0],
        main_input_name=artifact.model_fields["main_input_name"],
        skeleton=skeleton,
        ways=ways,
    )


def _with_own_cache(artifact: ArtifactReader,
    given: tuple[Any, ...],
    step: Form,
    make_program: Callable[[tuple[str, ...]], GuardedPrograms[RankProgram]],
    joined: JoinedRank,
    more: Callable[[Lengths], Any] | None,
) -> DistributedCausalLM:
    """Which states change hands is read off the graphs of the other stages, too: without their weights."""
    from autodist_fx.runtime.generation.recurrent_lm import DistributedOwnCacheLM, Prompt, handovers

    prompt = next((form for form in artifact.forms.values() if form.phase == "prompt"), None)
    if prompt is None:
        raise ArtifactError(f"{artifact.directory} has steps and no prompt{MAKE_AGAIN}")
    column = artifact.mesh.column(joined.rank)
    steps = [artifact.read_program(rank, step, None) for rank in column]

    def with_handovers(form: Form) -> Prompt:
        makers = [artifact.read_program(rank, form, None) for rank in column]
        return artifact.program(joined.rank, form.name, joined.device), handovers(makers, steps)

    return DistributedOwnCacheLM(
        *given,
        device=joined.device,
        make_program=make_program,
        prompts=_ways(artifact, prompt, with_handovers, more),
        steps=_ways(artifact, step, lambda form: artifact.program(joined.rank, form.name, joined.device)),
        after_step=handovers(steps, steps),
    )
