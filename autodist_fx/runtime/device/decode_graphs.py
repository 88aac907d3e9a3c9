"""`DecodeGraphs`: runs steps of one token by CUDA graphs, captured once and replayed.

A step of decoding is hundreds of short kernels, and Python takes longer to launch each than a GPU to run it; a replay
launches them all at once. A graph repeats addresses and sizes: so the program is the one for a cache of constant size
(passes/program/static_cache.py), its inputs are copied to where they were at the capture, and what it gives is copied
from there. What a capture cannot hold stands between graphs (passes/program/regions.py): messages (Gloo's; between
stages), and ops for whose numbers the host waits (experts, which get the rows that a router sent to them).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from autodist_fx.errors import AutodistError
from autodist_fx.runtime.cache.cross_cache import CrossCache
from autodist_fx.runtime.cache.kv_cache import SplitCache
from autodist_fx.runtime.device.cuda import Pool, to_device
from autodist_fx.runtime.device.static_key_values import StaticKeyValues
from autodist_fx.runtime.generation.step import Step
from passes.fx.arguments import fetch
from passes.ops.buffers import written_buffers
from passes.ops.comm import COLLECTIVES, COMM_OPS, send
from passes.program.rank_program import RankProgram
from passes.program.regions import Region, arguments, regions
from passes.program.static_cache import PAST, static_cache

LEAST_CAPACITY = 256  # tokens that a cache has room for; doubled whenever it is full, when all is captured anew
_MOST = 4  # programs x batches x capacities whose graphs are kept
_LEAST_TOLERANCE, _MOST_TOLERANCE = 1e-6, 0.1  # of a trial: of norms in float32 within float64; of bfloat16


class DecodeGraphs:
    """The captured steps of one rank. `whole`: collectives of the tp group are captured, too (NCCL's can be).

    All ranks come to the same decisions, by lengths and by the kinds of layers that the whole model has: a program's
    first step is run twice, as it is and for the static cache, and so are its messages.
    """

    def __init__(self, device: torch.device, *, whole: bool) -> None:
        self._device, self._whole = device, whole
        self._pool = Pool(device)
        self._steps: dict[tuple[int, int, int], CapturedStep] = {}  # least recently made first
        self._said: set[str] = set()

    def takes(self, program: RankProgram, step: Step) -> bool:
        """Return whether a step is one of these: one token a row, behind others, in layers that hold all tokens."""
        mask, past = step.attention_mask, step.cache.tokens
        if step.input_ids.shape[1] != 1 or not past or step.further or isinstance(step.cache, CrossCache):
            return False
        if (mask is not None and mask.dim() != 2) or torch.is_grad_enabled():
            return False
        windows = [w for layer in step.cache.kinds_of_all if (w := getattr(layer, "sliding_window", None)) is not None]
        if windows and min(windows) <= self._capacity(past + 1):
            self._say(f"a window of {min(windows)} tokens is reached: from here on steps run without CUDA graphs")
            return False
        return True

    def run(
        self, program: RankProgram, inputs: Mapping[str, Any], cache: SplitCache, run: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the outputs of a step that these graphs take, `inputs` by name; the cache then has its token. `run()`
        runs it as it is, which the first step of a program does. Raises PlanError where the program has no static
        form, AutodistError where that gives other numbers."""
        past = cache.tokens
        key = (id(program), inputs["input_ids"].shape[0], self._capacity(past + 1))
        captured = self._steps.get(key)
        if captured is not None:
            return captured.run(inputs, cache, past)
        if written := written_buffers(program.graph_module):
            raise AutodistError(f"each step writes {written[0]}, a capture several times: generate without cuda_graphs")
        captured = CapturedStep(program, inputs, cache, key[2], self._pool, self._device, whole=self._whole)
        outputs = run()
        captured.check(inputs, cache, past, outputs)
        self._steps = dict([*self._steps.items(), (key, captured)][-_MOST:])
        return outputs

    def _capacity(self, tokens: int) -> int:
        capacity = LEAST_CAPACITY
        while capacity < tokens:
            capacity *= 2
        return capacity

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(f"cuda_graphs: {what}", stacklevel=2)


class CapturedStep:
    """A program for one batch and capacity: its static inputs, keys and values, and the parts that it runs in."""

    def __init__(
        self,
        program: RankProgram,
        inputs: Mapping[str, Any],
        cache: SplitCache,
        capacity: int,
        pool: Pool,
        device: torch.device,
        *,
        whole: bool,
    ) -> None:
        self._program, self._pool, self._device = program, pool, device  # the program is held: its id is a key
        self._module = static_cache(program.graph_module, capacity)
        between = tuple(op for op in COMM_OPS if not (whole and op in COLLECTIVES))
        self._parts = regions(self._module, lambda node: node.op == "call_function" and node.target in between)
        self._keys_values = StaticKeyValues(cache, len(program.cache_layers), capacity, device)
        self._inputs = self._static_inputs(inputs, capacity)
        self._replays: dict[int, Callable[[], None]] = {}  # by the part's place
        self._values = self._known_values()

    def _static_inputs(self, inputs: Mapping[str, Any], capacity: int) -> dict[str, torch.Tensor]:
        """Return tensors for the step's own, the mask as long as the cache."""
        found = {}
        with torch.inference_mode(False):
            for name in self._program.input_names:
                x = inputs.get(name)
                if isinstance(x, torch.Tensor):
                    shape = (x.shape[0], capacity) if name == "attention_mask" else x.shape
                    found[name] = torch.zeros(shape, dtype=x.dtype, device=self._device)
        return found

    def _known_values(self) -> dict[Node, Any]:
        """Return the values of the graph's inputs and weights."""
        own = {"past_key_values": self._keys_values, PAST: self._keys_values.past_tokens}
        given: dict[str, Any] = {**self._inputs, **own}
        values: dict[Node, Any] = {}
        for node in self._module.graph.nodes:
            if node.op == "placeholder":
                values[node] = given.get(str(node.target))
            elif node.op == "get_attr":
                values[node] = fetch(self._module, str(node.target))
        return values

    def _fill(self, inputs: Mapping[str, Any], cache: SplitCache, past: int) -> None:
        for name, own in self._inputs.items():
            x = to_device(inputs[name], self._device)
            if name == "attention_mask":
                own.zero_()
                own[:, : past + 1].copy_(x)
            else:
                own.copy_(x)
        self._keys_values.begin(cache, past)

    def check(self, inputs: Mapping[str, Any], cache: SplitCache, past: int, outputs: Mapping[str, Any]) -> None:
        """Run the static program on a step that has run as it is, with numbers where no token is, and compare what it
        gives and what it writes. Raises AutodistError where they differ."""
        self._fill(inputs, cache, past)
        self._keys_values.fill_unwritten(past)
        found = self._run_parts(self._eagerly)
        pairs = [(name, found[name], wanted) for name, wanted in outputs.items() if isinstance(wanted, torch.Tensor)]
        for index, rooms in enumerate(self._keys_values.layers):
            layer = cache.layers[index]
            for room, held in zip(rooms, (layer.keys, layer.values), strict=True):
                pairs.append((f"cache layer {index}", room[:, :, past], held[:, :, past]))
        wrong = next((name for name, got, wanted in pairs if not _alike(got, wanted)), None)
        self._keys_values.fill_unwritten(past, 0.0)
        if wrong is not None:
            raise AutodistError(
                f"a step for a cache of constant size gives another {wrong} than the step itself (something reads all "
                "tokens that there is room for): generate without cuda_graphs"
            )

    def run(self, inputs: Mapping[str, Any], cache: SplitCache, past: int) -> dict[str, Any]:
        """Return the outputs of a step, by name, in memory of their own."""
        self._fill(inputs, cache, past)
        found = self._run_parts(self._replayed)
        self._keys_values.end(cache, past)
        return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in found.items()}

    def _run_parts(self, run: Callable[[int, Region], tuple[Any, ...]]) -> dict[str, Any]:
        for place, part in enumerate(self._parts):
            if isinstance(part, Node):
                self._message(part)
            elif part.waits:
                for node, value in zip(part.outputs, self._eagerly(place, part), strict=True):
                    self._keep(node, value)
            else:
                self._values.update(zip(part.outputs, run(place, part), strict=True))
        output = next(node for node in reversed(self._module.graph.nodes) if node.op == "output")
        return {
            name: self._values[value] if isinstance(value, Node) else value
            for name, value in output.args[0].items()
            if not (isinstance(value, Node) and self._values[value] is self._keys_values)
        }

    def _eagerly(self, place: int, region: Region) -> tuple[Any, ...]:
        return tuple(region.module(*(self._values[node] for node in region.inputs)))

    def _replayed(self, place: int, region: Region) -> tuple[Any, ...]:
        """Return a region's outputs after a replay; it is captured first where it was not, when its inputs are where
        they will be."""
        if place not in self._replays:
            self._replays[place], made = self._pool.capture(lambda: self._eagerly(place, region))
            self._values.update(zip(region.outputs, made, strict=True))
        self._replays[place]()
        return tuple(self._values[node] for node in region.outputs)

    def _message(self, node: Node) -> None:
        """Send, receive or add up; what comes stays in one place. What is sent is a copy, since it may still be on its
        way at the next replay."""
        args, kwargs = arguments(node, self._values)
        if node.target is send:
            args = (args[0].clone(), *args[1:])
        self._keep(node, node.target(*args, **kwargs))

    def _keep(self, node: Node, result: Any) -> None:
        """Let the graphs behind read a result: a tensor where it was at their capture, while its size is the same."""
        known = self._values.get(node)
        if isinstance(result, torch.Tensor) and isinstance(known, torch.Tensor) and known.shape == result.shape:
            known.copy_(result)
        else:
            self._values[node] = result.clone() if isinstance(result, torch.Tensor) else result


def _alike(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Return whether two tensors are as near as the same sums in another order."""
    if not wanted.is_floating_point() or not wanted.numel():
        return bool(torch.equal(got, wanted))
    tolerance = min(max(256 * torch.finfo(wanted.dtype).eps, _LEAST_TOLERANCE), _MOST_TOLERANCE)
    return bool((got - wanted).abs().max() <= tolerance * wanted.abs().max())
