"""Predictions change only on purpose: those of a model on a machine that was measured once, against a table of them.

EXPECTTEST_ACCEPT=1 python -m pytest tests/autodist_fx/measure/test_predictions.py writes it anew, with each of the two
versions of transformers, whose graphs differ: read the diff before you commit it. Whether predictions are right is not
asked here, but by benchmarks/predictions.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import transformers
from transformers import LlamaConfig

from autodist_fx.measure.predict import Forecast, Predicted
from cost_model.costs.hardware import H100, Hardware
from cost_model.mesh import Mesh
from cost_model.request.hardware_file import load_hardware
from cost_model.request.plan_request import PlanRequest

DATA = Path(__file__).parent / "data"
TABLE = DATA / "predictions.json"
VERSION = f"transformers {transformers.__version__.partition('.')[0]}"
MESHES = (Mesh(), Mesh(tp=2), Mesh(pp=2), Mesh(tp=4, pp=2))
CONFIG = LlamaConfig(
    hidden_size=768, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=12, num_key_value_heads=4,
    vocab_size=32000, tie_word_embeddings=False,
)  # fmt: skip


def written(found: Predicted) -> dict[str, object]:
    """As it stands in the table: five digits, which do not depend on a machine's exp and log."""
    return {"seconds": float(f"{found.seconds:.5g}"), "bytes": list(found.memory)}


def predictions(forecast: Forecast, machine: Hardware) -> dict[str, object]:
    table: dict[str, object] = {}
    for mesh in MESHES:
        request = PlanRequest(mesh, machine)
        table[str(mesh)] = {
            "forward of 4 x 128": written(forecast.forward(request, 4, 128)),
            "prompt of 512": written(forecast.step(request, 1, 512, 0)),
            "step behind 512": written(forecast.step(request, 1, 1, 512)),
        }
    return table


def test_predictions_are_those_of_the_table() -> None:
    forecast, measured = Forecast(CONFIG), load_hardware(DATA / "machine.json")[0]
    found = {machine.name: predictions(forecast, machine) for machine in (measured, H100)}
    table = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
    if os.environ.get("EXPECTTEST_ACCEPT"):
        TABLE.write_text(json.dumps({**table, VERSION: found}, indent=1, sort_keys=True) + "\n")
    else:
        assert found == table[VERSION]


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_a_share_of_a_machine_takes_as_much_longer(share: float) -> None:
    measured = load_hardware(DATA / "machine.json")[0]
    part = measured.at_share(share)
    assert part.stream_seconds(1e6) == pytest.approx(measured.stream_seconds(1e6) / share)
    assert part.view_seconds == pytest.approx(measured.view_seconds / share)
    assert part.computing(2).op_seconds == pytest.approx(measured.computing(2).op_seconds / share)
    assert H100.at_share(share).stream_seconds(1e6) == pytest.approx(H100.stream_seconds(1e6) / share)
