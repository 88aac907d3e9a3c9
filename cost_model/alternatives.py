"""What else could have been chosen for an op, at what cost, or why not: for people who ask a plan for its reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from cost_model.errors import PlanError
from cost_model.op_graph import Op, TensorRef
from cost_model.op_rule import Letter
from cost_model.plan import Alternative, rounded
from cost_model.roles import role_of
from cost_model.tensor_parallel import Strategy, TensorParallelResult, TensorParallelSearch


class AlternativeCosts:
    """The roles that each op of one solved search could have."""

    def __init__(self, search: TensorParallelSearch, result: TensorParallelResult) -> None:
        self.search = search
        self.result = result
        self._known: dict[str, tuple[Alternative, ...]] = {}  # by variable: alike experts choose alike

    def of(self, op: Op) -> tuple[Alternative, ...]:
        """All roles that the op's rule knows, its own first; () where there is nothing to choose."""
        variable = self.result.variable[op.name]
        if variable not in self._known:
            self._known[variable] = self._of(op)
        return self._known[variable]

    def _of(self, op: Op) -> tuple[Alternative, ...]:
        domain = self.result.domains[op.name]
        own = role_of(op, self.result.strategies[op.name].letter)
        letters = {role_of(op, letter.name): letter for letter in _rule_letters(self.search, op)}
        possible: dict[str, list[int]] = {}
        for k, strategy in enumerate(domain):
            possible.setdefault(role_of(op, strategy.letter), []).append(k)
        roles = dict.fromkeys([own, *possible, *letters])
        if not own or self.search.tp == 1 or len(roles) == 1:
            return ()
        found = []
        for role in roles:
            if role == own:
                found.append(Alternative(role))
            elif op.name in self.search.pins:
                found.append(Alternative(role, impossible=f"it is pinned to {own}"))
            elif role in possible:
                found.append(self._forced(op, role, possible[role]))
            else:
                found.append(Alternative(role, impossible=why_not(self.search, op, letters[role])))
        return tuple(found)

    def _forced(self, op: Op, role: str, values: list[int]) -> Alternative:
        dearer_by = self.result.elimination.dearer_by(self.result.variable[op.name])
        best = min(values, key=lambda k: dearer_by[k])
        if dearer_by[best] == float("inf"):
            return Alternative(role, impossible="no op next to it can write or read its tensors so")
        changed = {
            name: self.result.domains[name][k]
            for name, k in self.result.forced(op.name, best).items()
        }
        seconds, nbytes = self._difference(changed)
        return Alternative(role, rounded(seconds), nbytes)

    def _difference(self, changed: Mapping[str, Strategy]) -> tuple[float, int]:
        """Seconds, and bytes of weights on the rank that holds most of each, that the changed strategies add."""
        search, before = self.search, self.result.strategies
        seconds, nbytes = 0.0, 0
        edges: dict[tuple[str, int], TensorRef] = {}
        alike = Counter(self.result.variable[name] for name in changed)
        for name, now in changed.items():
            op, was = search.graph[name], before[name]
            times = alike[name]  # 0 for one that costs what its twin does, which stands for all
            if times:
                seconds += times * (search.compute_seconds(op, now) - search.compute_seconds(op, was))
                seconds += times * (search.gather_seconds(op, now) - search.gather_seconds(op, was))
            if times and op.kind == "param":
                nbytes += times * (search.held_bytes(op, now) - search.held_bytes(op, was))
            edges.update(((name, slot), ref) for slot, ref in enumerate(op.inputs))
            for j in range(len(op.outputs)):
                ref = TensorRef(name, j)
                edges.update((user, ref) for user in search.graph.users.get(ref, ()))
        for (user, slot), ref in edges.items():
            now, was = changed.get(user, before[user]), before[user]
            seconds += search.agreement(changed.get(ref.op, before[ref.op]), ref.index, now.inputs[slot], ref)
            seconds -= search.agreement(before[ref.op], ref.index, was.inputs[slot], ref)
        return seconds, nbytes


def _rule_letters(search: TensorParallelSearch, op: Op) -> tuple[Letter, ...]:
    return search.layouts.rules(op, search.graph.input_specs(op)).letters


def refuse_impossible_roles(search: TensorParallelSearch) -> None:
    """Raises PlanError, which says why, where an op cannot have the role that it is pinned to."""
    for name, role in search.pins.items():
        op = search.graph[name]
        if search.domain(op):
            continue
        letter = next((x for x in _rule_letters(search, op) if role_of(op, x.name) == role), None)
        if search.tp == 1:
            why = "tp=1 cuts nothing"
        elif letter is None:
            why = f"the rule of {op} has no such way to cut it"
        else:
            why = why_not(search, op, letter)
        raise PlanError(f"{op.module or name} cannot be {role}: {why}")


def why_not(search: TensorParallelSearch, op: Op, letter: Letter) -> str:
    """Why no strategy of `op` cuts it along this letter of its rule."""
    if search.decides(op):
        return "it decides where data goes (a router, say), and is whole on every rank: rounding must change no choice"
    dims = [(op.inputs[x.slot], x.dim) for x in letter.inputs]
    dims += [(TensorRef(op.name, x.slot), x.dim) for x in letter.outputs]
    if any(search.graph.spec(ref).is_dynamic(dim) for ref, dim in dims):
        return "that length follows the model's inputs"
    if letter.filled and letter.size < search.tp:
        return f"{letter.size} cannot be cut into {search.tp} parts, and none may be empty"
    layouts = [search.layouts.layout(ref, dim) for ref, dim in dims]
    if all(layout is None for layout in layouts):
        return f"no grain to cut: its {letter.size} elements belong together (one head, say) and every rank reads all"
    if letter.reduces and any(layout is not None and layout.overlaps for layout in layouts):
        return "several ranks hold the same elements (a shared KV head, say), and a sum would count them twice"
    if letter.filled:
        return f"some of {search.tp} ranks would get no part, and none may be empty"
    return "nothing that it reads or writes is cut there"
