"""Reading an artifact: this process's rank of it, or all of it; without tracing, planning, or the model's own code."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from autodist_fx.artifact.files import CheckedFiles
from autodist_fx.artifact.manifest import (
    ArtifactError,
    check_listing,
    json_object,
    library_versions,
    read_manifest,
)
from autodist_fx.artifact.variant_format import Form, conditions_from_dict, form_from_dict, program_from_dict
from autodist_fx.calls.input_spec import InputForm
from autodist_fx.calls.lengths import Lengths, another_way
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.agreement import agree
from autodist_fx.runtime.comm.process_group import DEFAULT_TIMEOUT_SECONDS, JoinedRank, join
from autodist_fx.runtime.generation.causal_lm import DistributedCausalLM
from autodist_fx.runtime.generation.guarded_programs import Ways
from autodist_fx.runtime.generation.two_graphs import TwoGraphCausalLM
from autodist_fx.startup.from_artifact import T
from autodist_fx.weights.load import LoadReport
from autodist_fx.weights.process_memory import peak_rss_bytes, rss_bytes
from cost_model.errors import PlanError
from cost_model.mesh import Mesh
from cost_model.plan.data import PartitionPlan
from cost_model.plan.read_json import plan_from_text
from passes.fx.guards import Conditions
from passes.program.rank_program import RankProgram

if TYPE_CHECKING:
    from autodist_fx.artifact.loaded_variants import LoadedModel

TOKENIZER = "tokenizer"
SAVE_SUCH = ", and the artifact has no form for that: save one by calling simulate with such lengths before save"
_AGAIN = ": make the artifact again"


class Artifact:
    """An artifact on the disk: `plan`, `mesh`, `config`, `rank(r)`, `simulate(**inputs)`, `verify()`,
    `to_distributed()`. Files are read when they are asked for, and checked then."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(os.path.abspath(Path(directory).expanduser()))
        self.manifest = read_manifest(self.directory)
        check_listing(self.directory, self.manifest)
        self._files = CheckedFiles(self.directory, self.manifest)
        self._weights: dict[tuple[int, torch.device], dict[str, torch.Tensor]] = {}
        _warn_of_versions(self.directory, self.manifest.versions)

    @property
    def mesh(self) -> Mesh:
        return Mesh(self.manifest.tp, self.manifest.pp)

    @cached_property
    def plan(self) -> PartitionPlan:
        """Every decision made; print it, compare it."""
        return self.read_plan("plan.json")

    def _repr_html_(self) -> str:
        """For notebooks: the plan."""
        return self.plan._repr_html_()

    def read_plan(self, name: str) -> PartitionPlan:
        path = self.directory / name
        try:
            plan = plan_from_text(self._files.read(name).decode())
        except (PlanError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path}: {error}{_AGAIN}") from error
        if plan.mesh != self.mesh:
            raise ArtifactError(f"{path} is for {plan.mesh}, and the manifest says {self.mesh}{_AGAIN}")
        return plan

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's."""
        return self._configuration("config.json", _config_of)

    @cached_property
    def generation_config(self) -> GenerationConfig | None:
        if not self._files.has("generation_config.json"):
            return None
        # which notes more than from_dict does, for generate
        return self._configuration(
            "generation_config.json", lambda fields: GenerationConfig.from_pretrained(str(self.directory))
        )

    def _configuration(self, name: str, read: Any) -> Any:
        path = self.directory / name
        fields = json_object(self._files.read(name), str(path), strict=False)  # transformers writes Infinity
        try:
            return read(fields)
        except (KeyError, ValueError, TypeError, AttributeError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ArtifactError(f"{path} cannot be read ({reason}){_AGAIN}") from error

    @cached_property
    def model_fields(self) -> dict[str, Any]:
        """What is known of the model's class: model.json."""
        fields = self._files.read_json("model.json")
        texts = ("class", "main_input_name", "main")
        flags = ("own_generate", "own_cache", "positions_follow_mask")
        right = all(isinstance(fields.get(text), str) for text in texts)
        if not right or not all(type(fields.get(flag)) is bool for flag in flags):
            raise ArtifactError(f"{self.directory / 'model.json'} is malformed{_AGAIN}")
        if fields["main"] not in self.manifest.forms:
            raise ArtifactError(f"{self.directory / 'model.json'} names a form that is not there{_AGAIN}")
        return fields

    @cached_property
    def forms(self) -> dict[str, Form]:
        """The traced forms in it, by name."""
        found = {}
        for name in self.manifest.forms:
            where = f"forms/{name}/form.json"
            form = form_from_dict(self._files.read_json(where), str(self.directory / where))
            if form.name != name or (form.encoder and form.encoder not in self.manifest.forms):
                raise ArtifactError(f"{self.directory / where} is of another form{_AGAIN}")
            found[name] = form
        return found

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that was saved along. ArtifactError where there is none."""
        names = [name for name in self.manifest.files if name.startswith(f"{TOKENIZER}/")]
        if not names:
            raise ArtifactError(f"{self.directory} has no tokenizer: save it with tokenizer=..., or encode by hand")
        for name in names:
            self._files.check(name)
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(self.directory / TOKENIZER), trust_remote_code=False)
        except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ArtifactError(f"the tokenizer in {self.directory / TOKENIZER} cannot be read: {reason}") from error
        return tokenizer

    # -- programs -----------------------------------------------------------------------------------------------------

    def program(self, rank: int, form: str | None = None, device: torch.device | str = "cpu") -> RankProgram:
        """Everything that global rank `rank` runs, with its weights; of the main form where none is named."""
        self.mesh.coordinates(rank)  # names a rank that is not there
        name = form or self.model_fields["main"]
        if name not in self.forms:
            raise AutodistError(f"{self.directory} has no form {name!r}: it has {', '.join(self.forms)}")
        return self._read_program(rank, self.forms[name], self._weights_of(rank, torch.device(device)))

    def _read_program(self, rank: int, form: Form, weights: Mapping[str, torch.Tensor] | None) -> RankProgram:
        name = f"{form.folder}/rank{rank}.json"
        return program_from_dict(self._files.read_json(name), rank, self.mesh, weights, str(self.directory / name))

    def rank(self, rank: int) -> torch.fx.GraphModule:
        """The GraphModule of global rank `rank`, with its weights."""
        return self.program(rank).graph_module

    def _weights_of(self, rank: int, device: torch.device) -> dict[str, torch.Tensor]:
        if (rank, device) not in self._weights:
            name = f"weights/rank{rank}.safetensors"
            tensors, metadata = self._files.read_tensors(name, device)
            if metadata.get("rank") != str(rank):
                raise ArtifactError(
                    f"{self.directory / name} holds the weights of rank {metadata.get('rank')!r}, and should hold "
                    f"those of rank {rank}{_AGAIN}"
                )
            self._weights[rank, device] = tensors
        return self._weights[rank, device]

    # -- all ranks here -----------------------------------------------------------------------------------------------

    @cached_property
    def whole(self) -> LoadedModel:
        """All ranks in this process, as `compile` gives them."""
        from autodist_fx.artifact.loaded_variants import load_whole  # which imports what compiles

        return load_whole(self, self._files)

    def simulate(self, **inputs: Any) -> Any:
        """All ranks in this process; see CompiledModel.simulate. AutodistError for a call that has no form here."""
        return self.whole.simulate(**inputs)

    def verify(self) -> None:
        """Prove the programs on the disk against the model's graph beside them. Raises VerificationError."""
        self.whole.verify()

    # -- one rank -----------------------------------------------------------------------------------------------------

    def to_distributed(
        self,
        *,
        device: str | torch.device | None = None,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        rank: int | None = None,
        world_size: int | None = None,
        master_addr: str | None = None,
        master_port: int | None = None,
    ) -> DistributedCausalLM:
        """This process's share, ready to generate; see `load`."""
        joined = join(
            self.mesh,
            device=device,
            rank=rank,
            world_size=world_size,
            master_addr=master_addr,
            master_port=master_port,
            timeout_seconds=timeout,
        )
        agree(joined.communicator, joined.rank, self.mesh.size, [self.manifest.to_text()], what="artifact")
        return self.share(joined)

    def share(
        self,
        joined: JoinedRank,
        whole_sequences: Callable[[tuple[str, ...], RankProgram], Ways[RankProgram]] | None = None,
        at_lengths: Callable[[Lengths, RankProgram], Any] | None = None,
    ) -> DistributedCausalLM:
        """The share of `joined`. What the artifact lacks is made by `whole_sequences(input_names, program)` and, of the
        graphs that generate, by `at_lengths(lengths, program)`, with the weights of `program`."""
        began, rss_before = time.perf_counter(), rss_bytes()
        form = self._generating_form()
        program = self.program(joined.rank, form.name, joined.device)

        more = None if at_lengths is None else lambda lengths: at_lengths(lengths, program)

        def mine(form: Form) -> RankProgram:
            return self.program(joined.rank, form.name, joined.device)

        def make_program(names: tuple[str, ...]) -> Ways[RankProgram]:
            found = self._form_of_whole_sequences(names)
            if found is not None:
                return self._ways(found, mine)
            if whole_sequences is not None:
                return whole_sequences(names, program)
            raise AutodistError(
                f"{self.directory} has no graph of whole sequences that takes {', '.join(names)} (it has "
                f"{self._described()}): save one by calling simulate with them first, or use from_pretrained"
            )

        given = program, joined.communicator, self.config, self.generation_config
        if form.encoder:
            ways = self._ways(form, lambda form: (mine(self.forms[form.encoder]), mine(form)), more)
            split = self._with_encoder(given, ways, joined.device)
        elif form.phase:
            split = self._with_own_cache(given, form, make_program, joined, more)
        else:
            split = TwoGraphCausalLM(
                *given, device=joined.device, make_program=make_program, ways=self._ways(form, mine, more)
            )
        weights = self._weights_of(joined.rank, joined.device)
        split.plan = self.plan
        split.positions_follow_mask = self.model_fields["positions_follow_mask"]
        split.load_report = LoadReport(
            shard_bytes=sum(t.numel() * t.element_size() for t in weights.values()),
            bytes_read=self.manifest.files[f"weights/rank{joined.rank}.safetensors"].bytes,
            checkpoint_bytes=sum(r.bytes for n, r in self.manifest.files.items() if n.startswith("weights/")),
            seconds=time.perf_counter() - began,
            rss_before_bytes=rss_before,
            peak_rss_bytes=peak_rss_bytes(),
        )
        return split

    def _ways(
        self, first: Form, run: Callable[[Form], T], more: Callable[[Lengths], Any] | None = None
    ) -> Ways[T]:
        """What `run` makes of a form, and of those for the same call with other lengths; `more` makes others."""
        same = [f for f in self.forms.values() if f.same_call(first)]
        found = [(self.conditions_of(form), run(form)) for form in (first, *(f for f in same if f is not first))]
        dtypes = {name: getattr(torch, dtype, torch.long) for name, (_, dtype) in first.input_forms.items()}
        forms = {name: InputForm(dims, dtypes[name]) for name, (dims, _) in first.input_forms.items()}

        def refuse(lengths: Lengths) -> tuple[Conditions | None, T]:
            lines = found[0][0].otherwise(lengths) if found[0][0] is not None else []
            raise AutodistError(another_way(self.manifest.model, lengths, lines) + SAVE_SUCH)

        return Ways(found, more or refuse, forms)

    def conditions_of(self, form: Form) -> Conditions | None:
        return conditions_from_dict(form.conditions, str(self.directory / form.folder / "form.json"))

    def _with_encoder(
        self, given: tuple[Any, ...], ways: Ways[tuple[RankProgram, RankProgram]], device: torch.device
    ) -> DistributedCausalLM:
        from autodist_fx.runtime.generation.seq2seq_lm import DistributedSeq2SeqLM, seq2seq_class

        split_class, skeleton = DistributedSeq2SeqLM, None
        if self.model_fields["own_generate"]:  # a generate of the family's own, which is in the model's code
            from autodist_fx.tracing import class_for, empty_model

            split_class, skeleton = seq2seq_class(class_for(self.config)), empty_model(self.config)
        return split_class(
            *given,
            device=device,
            encoder=ways.found[0][1][0],
            main_input_name=self.model_fields["main_input_name"],
            skeleton=skeleton,
            ways=ways,
        )

    def _with_own_cache(
        self,
        given: tuple[Any, ...],
        step: Form,
        make_program: Callable[[tuple[str, ...]], Ways[RankProgram]],
        joined: JoinedRank,
        more: Callable[[Lengths], Any] | None,
    ) -> DistributedCausalLM:
        """Which states change hands is read off the graphs of the other stages, too: without their weights."""
        from autodist_fx.runtime.generation.recurrent_lm import DistributedOwnCacheLM, Prompt, handovers

        prompt = next((form for form in self.forms.values() if form.phase == "prompt"), None)
        if prompt is None:
            raise ArtifactError(f"{self.directory} has steps and no prompt{_AGAIN}")
        column = self.mesh.column(joined.rank)
        steps = [self._read_program(rank, step, None) for rank in column]

        def with_handovers(form: Form) -> Prompt:
            makers = [self._read_program(rank, form, None) for rank in column]
            return self.program(joined.rank, form.name, joined.device), handovers(makers, steps)

        return DistributedOwnCacheLM(
            *given,
            device=joined.device,
            make_program=make_program,
            prompts=self._ways(prompt, with_handovers, more),
            steps=self._ways(step, lambda form: self.program(joined.rank, form.name, joined.device)),
            after_step=handovers(steps, steps),
        )

    def _generating_form(self) -> Form:
        encoders = {form.encoder for form in self.forms.values()}
        for form in self.forms.values():
            if form.use_cache and form.phase != "prompt" and form.name not in encoders:
                return form
        raise AutodistError(
            f"{self.directory} holds {self.manifest.model} in no form that processes generate with: use "
            "adx.load(directory).simulate(...) in one process"
        )

    def _form_of_whole_sequences(self, names: tuple[str, ...]) -> Form | None:
        for form in self.forms.values():
            if not form.use_cache and set(form.inputs) == set(names) and not form.fixed:
                return form
        return None

    def _described(self) -> str:
        return "; ".join(f"{form.name}: {', '.join(form.inputs)}" for form in self.forms.values())


def _config_of(fields: dict[str, Any]) -> PretrainedConfig:
    kind = fields.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"transformers knows no model type {kind!r}")
    return CONFIG_MAPPING[kind].from_dict(fields)


def _warn_of_versions(directory: Path, made_with: Mapping[str, str]) -> None:
    here = library_versions()
    other = [f"{name} {v} (here {here[name]})" for name, v in made_with.items() if name in here and here[name] != v]
    if other:
        made = f"{directory} was made with {', '.join(other)}"
        warnings.warn(f"{made}: compare its output, or make it again", stacklevel=3)


__all__ = ["Artifact"]
