"""Costs of the roles that were not chosen for an op, or why they are impossible; `explain` prints them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from cost_model.errors import PlanError
from cost_model.graph.op_graph import Op, TensorRef
from cost_model.graph.roles import role_of
from cost_model.plan.data import Alternative, rounded
from cost_model.rules.rule import Factor
from cost_model.search.strategy import TensorParallelResult
from cost_model.search.tensor_parallel import TensorParallelSearch


class AlternativeCosts:
    """The costs of all roles that the ops of one solved search could have."""

    def __init__(self, search: TensorParallelSearch, result: TensorParallelResult) -> None:
        self.search = search
        self.result = result
        self._known: dict[str, tuple[Alternative, ...]] = {}  # by variable: alike experts choose alike
        self._alike = Counter(result.variable.values())
        self._pairs: dict[str, list[tuple[str, str]]] = {}
        for pair in result.pairs:
            for variable in pair:
                self._pairs.setdefault(variable, []).append(pair)

    def of(self, op: Op) -> tuple[Alternative, ...]:
        """Returns all roles that the op's rule has, the chosen one first; () where there is nothing to choose."""
        variable = self.result.variable[op.name]
        if variable not in self._known:
            self._known[variable] = self._of(op)
        return self._known[variable]

    def _of(self, op: Op) -> tuple[Alternative, ...]:
        domain = self.result.domains[op.name]
        own = role_of(op, self.result.strategies[op.name].factor)
        factors = {role_of(op, factor.name): factor for factor in _rule_factors(self.search, op)}
        possible: dict[str, list[int]] = {}
        for k, strategy in enumerate(domain):
            possible.setdefault(role_of(op, strategy.factor), []).append(k)
        roles = dict.fromkeys([own, *possible, *factors])
        if not own or self.search.tp == 1 or len(roles) == 1:
            return ()
        alternatives = []
        for role in roles:
            if role == own:
                alternatives.append(Alternative(role))
            elif op.name in self.search.roles:
                alternatives.append(Alternative(role, impossible=f"it is pinned to {own}"))
            elif role in possible:
                alternatives.append(self._forced(op, role, possible[role]))
            else:
                alternatives.append(Alternative(role, impossible=why_not(self.search, op, factors[role])))
        return tuple(alternatives)

    def _forced(self, op: Op, role: str, values: list[int]) -> Alternative:
        """Returns the costs of the best plan in which the op has a role; `values` are the role's strategies, by their
        positions in the op's domain."""
        variable = self.result.variable[op.name]
        dearer_by = self.result.elimination.dearer_by(variable)
        best = min(values, key=lambda k: dearer_by[k])
        if dearer_by[best] == float("inf"):
            return Alternative(role, impossible="no op next to it can write or read its tensors so")
        seconds, nbytes = self._difference(self.result.elimination.forced(variable, best))
        return Alternative(role, rounded(seconds), nbytes)

    def _difference(self, changed: Mapping[str, int]) -> tuple[float, int]:
        """Returns the seconds that new choices of variables, `changed`, add to a forward, and the bytes that they add
        to weights, counted for each weight on the rank that holds most of it."""
        search, result, choice = self.search, self.result, self.result.elimination.choice
        seconds, nbytes = 0.0, 0
        pairs: dict[tuple[str, str], None] = {}
        for name, k in changed.items():
            op, times = search.graph[name], self._alike[name]
            now, was = result.domains[name][k], result.strategies[name]
            seconds += times * (search.compute_seconds(op, now) - search.compute_seconds(op, was))
            seconds += times * (search.gather_seconds(op, now) - search.gather_seconds(op, was))
            seconds += float(result.reading[name][k] - result.reading[name][choice[name]])
            if op.kind == "param":
                nbytes += times * (search.held_bytes(op, now) - search.held_bytes(op, was))
            pairs.update(dict.fromkeys(self._pairs.get(name, ())))
        for u, v in pairs:
            table = result.pairs[u, v]
            seconds += float(table[changed.get(u, choice[u]), changed.get(v, choice[v])] - table[choice[u], choice[v]])
        return seconds, nbytes


def _rule_factors(search: TensorParallelSearch, op: Op) -> tuple[Factor, ...]:
    return search.layouts.rules(op, search.graph.input_specs(op)).factors


def refuse_impossible_roles(search: TensorParallelSearch) -> None:
    """Raises PlanError, with the reason, if an op cannot have the role that it is pinned to."""
    for name, role in search.roles.items():
        op = search.graph[name]
        if search.domain(op):
            continue
        factor = next((x for x in _rule_factors(search, op) if role_of(op, x.name) == role), None)
        if search.tp == 1:
            why = "tp=1 cuts nothing"
        elif factor is None:
            why = f"the rule of {op} has no such way to cut it"
        else:
            why = why_not(search, op, factor)
        raise PlanError(f"{op.module or name} cannot be {role}: {why}")


def why_not(search: TensorParallelSearch, op: Op, factor: Factor) -> str:
    """Returns why no strategy of `op` cuts it along this factor of its rule, in words for users."""
    if search.decides(op):
        return "it decides where data goes (a router, say), and is whole on every rank: rounding must change no choice"
    dims = [(op.inputs[x.slot], x.dim) for x in factor.inputs]
    dims += [(TensorRef(op.name, x.slot), x.dim) for x in factor.outputs]
    if any(search.graph.spec(ref).is_dynamic(dim) for ref, dim in dims):
        return "that length follows the model's inputs"
    if factor.filled and factor.size < search.tp:
        return f"{factor.size} cannot be cut into {search.tp} parts, and none may be empty"
    layouts = [search.layouts.layout(ref, dim) for ref, dim in dims]
    if all(layout is None for layout in layouts):
        return f"no grain to cut: its {factor.size} elements belong together (one head, say) and every rank reads all"
    if factor.reduces and any(layout is not None and layout.overlaps for layout in layouts):
        return "several ranks hold the same elements (a shared KV head, say), and a sum would count them twice"
    if factor.filled:
        return f"some of {search.tp} ranks would get no part, and none may be empty"
    return "nothing that it reads or writes is cut there"
