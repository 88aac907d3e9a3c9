"""`DistributedOwnCacheLM`: generates with a model whose states are in a cache of its own (Mamba, hybrids, RWKV ...).

Two programs a rank: one for the prompt, one for each token after it. States are plain tensors, inputs and outputs of
the programs; each stays on the rank that made it. The two programs are cut into stages each by itself, so that one may
read what another stage's rank made: then it is sent there, after the step that made it (`handovers`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from autodist_fx.calls.cache_kinds import STATE_PREFIX
from autodist_fx.calls.lengths import Lengths
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.cache.kv_cache import SplitCache
from autodist_fx.runtime.comm.channels import Channel
from autodist_fx.runtime.generation.causal_lm import DistributedCausalLM
from autodist_fx.runtime.generation.guarded_programs import GuardedPrograms
from autodist_fx.runtime.generation.step import Step
from autodist_fx.runtime.generation.step_runner import RunnerParts
from passes.fx import node_meta
from passes.program.rank_program import RankProgram

Handover = tuple[str, int, int]  # a state, the stage that made it, the stage that reads it next
Phase = tuple[RankProgram, tuple[Handover, ...]]  # of a prompt or a step, and what is handed over after it


def states_made(program: RankProgram) -> set[str]:
    """Return the names of the states that a program gives back."""
    output = next(n for n in reversed(program.graph_module.graph.nodes) if n.op == "output")
    return {name for name in output.args[0] if name.startswith(STATE_PREFIX)}


def states_read(program: RankProgram) -> set[str]:
    """Return the names of the states that a program reads."""
    inputs = (n for n in program.graph_module.graph.nodes if n.op == "placeholder" and n.users)
    return {n.target for n in inputs if n.target.startswith(STATE_PREFIX)}


def handovers(makers: Sequence[RankProgram], readers: Sequence[RankProgram]) -> tuple[Handover, ...]:
    """Return which states are sent from stage to stage when `readers` run after `makers`; both have a program for
    each stage, in order."""
    made = [states_made(program) for program in makers]
    found = []
    for target, reader in enumerate(readers):
        for name in sorted(states_read(reader) - made[target]):
            source = next((stage for stage, names in enumerate(made) if name in names), None)
            if source is not None:  # else nobody changed it: it is where it was
                found.append((name, source, target))
    return tuple(found)


def check_reads(readers: Sequence[RankProgram], usual: Sequence[RankProgram]) -> None:
    """Raise AutodistError where a step's or prompt's programs, one for each stage, read a state on another stage than
    the usual step's, to which it is handed."""
    if len(usual) == 1:  # all states are here
        return
    for stage, (reader, its_usual) in enumerate(zip(readers, usual, strict=True)):
        if moved := states_read(reader) - states_read(its_usual):
            raise AutodistError(
                f"for these lengths stage {stage} reads {min(moved)}, which goes to another stage at all others: use "
                "pp=1, or longer prompts"
            )


def row_dims(program: RankProgram) -> dict[str, int | None]:
    """Return, of each state that a program reads, the dim that is the batch's rows (Mamba-2 has its layers in front of
    it); None where no dim is just that."""
    inputs = (n for n in program.graph_module.graph.nodes if n.op == "placeholder" and n.users)
    found = {n.target: node_meta.symbols(n) for n in inputs if n.target.startswith(STATE_PREFIX)}
    return {name: dims.index("B") if "B" in dims else None for name, dims in found.items()}


def mixing_line(program: RankProgram) -> str | None:
    """Return the model's line at which a program first combines each row of a batch with every other, as a tensor
    [B, B, ...] shows; None where it does not (RWKV's step does, by how it broadcasts)."""
    nodes = program.graph_module.graph.nodes
    return next((node_meta.where(node) for node in nodes if node_meta.symbols(node).count("B") > 1), None)


class StatesCache(SplitCache):
    """One rank's states by name. `row_dims` has the dim that counts the batch's rows, of each state that this rank's
    steps read; None for one that has them in no dim of their own. `mixing`: the line at which steps mix rows."""

    def __init__(self, row_dims: Mapping[str, int | None] | None = None, mixing: str | None = None) -> None:
        super().__init__()
        self._row_dims, self._mixing = row_dims or {}, mixing
        self.states: dict[str, torch.Tensor] = {}

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows for beam search: `beam_idx` [batch], int64, has the row that each row continues. Raises
        AutodistError for a state whose rows cannot be told apart, and for a model whose step mixes them: what it makes
        of a row then depends on the other beams, and transformers has no answer with a cache either."""
        super().reorder_cache(beam_idx)
        if self._mixing is not None:
            raise AutodistError(
                f"a step of this model mixes the rows of a batch ({self._mixing}): generate without beams"
            )
        for name in self.states.keys() & self._row_dims.keys():  # the others are read elsewhere, or by nobody
            state, dim = self.states[name], self._row_dims[name]
            if dim is None:
                shape = list(state.shape)
                raise AutodistError(f"{name} {shape} has no dim for the rows of a batch: generate without beams")
            self.states[name] = state.index_select(dim, beam_idx.to(state.device))

    def crop(self, argument: int) -> None:
        raise AutodistError("the states of a recurrence cannot be cropped to fewer tokens: leave that option out")

    def reset(self) -> None:
        self.states, self.tokens, self.mask, self.mask_tokens = {}, 0, None, 0


class DistributedOwnCacheLM(DistributedCausalLM):
    """One rank's share of a model with a cache of its own. The program of `parts` is the usual step's. `prompts` has
    the prompt's programs, one for each outcome of the guards on its length, and what is handed over after each; `steps`
    has the steps'."""

    def __init__(self, parts: RunnerParts, prompts: GuardedPrograms[Phase], *, steps: GuardedPrograms[Phase]) -> None:
        super().__init__(parts, steps)
        self._prompts = prompts
        self.prompt_program = prompts.found[0][1][0]
        self.prompt_module = self.prompt_program.graph_module.eval()
        self._inputs |= frozenset(self.prompt_program.input_names)
        self._row_dims, self._mixing = row_dims(self.program), mixing_line(self.program)

    def _why_one_stage(self) -> str:
        return super()._why_one_stage() or "a model with a cache of its own hands states over between its steps"

    def _programs_for(self, lengths: Lengths) -> GuardedPrograms[Any]:
        return self._programs if lengths["P"] else self._prompts

    def _choose(self, step: Step) -> Phase:
        """Return (program, what is handed over after it)."""
        tokens = step.input_ids.shape[1]
        if step.cache.tokens and tokens != 1:
            raise AutodistError(
                f"a model with a cache of its own takes one token at a time after its prompt; got {tokens}"
            )
        chosen: Phase = super()._choose(step)
        return chosen

    def run_variant(self, step: Step, variant: Phase) -> torch.Tensor | None:
        """Run the program on this rank's states, and hand over what the next step reads elsewhere."""
        program, after = variant
        cache = step.cache
        assert isinstance(cache, StatesCache)
        given = {
            "input_ids": step.input_ids,
            "attention_mask": step.attention_mask,
            "position_ids": step.position_ids,
            "cache_position": step.cache_position,
            **cache.states,
        }
        outputs = self._call(program, {name: given.get(name) for name in program.input_names})
        cache.states |= {name: x for name, x in outputs.items() if name.startswith(STATE_PREFIX)}
        self._hand_over(cache, after)
        cache.note(step.input_ids)
        return outputs.get("logits")

    def _hand_over(self, cache: StatesCache, states: Sequence[Handover]) -> None:
        mine, at = self.program.stage, self.program.tp_rank
        placeholders = {n.target: n for n in self.graph_module.graph.nodes if n.op == "placeholder"} if states else {}
        for name, source, target in states:
            if mine == source:
                state, peer = cache.states[name], self.mesh.rank(target, at)
                self.communicator.send(torch.tensor(state.shape), peer, Channel.STATES)
                self.communicator.send(state.contiguous(), peer, Channel.STATES)
            elif mine == target:
                example, peer = node_meta.val(placeholders[name]), self.mesh.rank(source, at)
                shape = self.communicator.recv((example.dim(),), torch.long, "cpu", peer, Channel.STATES).tolist()
                cache.states[name] = self.communicator.recv(shape, example.dtype, self.device, peer, Channel.STATES)

    def empty_cache(self) -> StatesCache:
        """Return a cache without states."""
        return StatesCache(self._row_dims, self._mixing)
