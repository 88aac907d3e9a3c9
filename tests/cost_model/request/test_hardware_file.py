"""A measured machine goes to JSON and back unchanged; what is damaged is refused, by file and field."""

import json

import pytest

from cost_model.costs.hardware import CPU_GLOO
from cost_model.errors import PlanError
from cost_model.mesh import Mesh
from cost_model.plan.data import PLAN_VERSION
from cost_model.request.devices import devices_of_stages
from cost_model.request.hardware_file import About, hardware_to_text, load_hardware, named_hardware, save_hardware
from cost_model.request.plan_options import PlanOptions
from tests.support.plans.measured import machine

ABOUT = About("2026-11-27", "AMD EPYC", "2.13.0")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "machine.json"
    save_hardware(machine(node_factor=1.5, step_seconds=1e-3), ABOUT, path)
    return path


def test_what_is_written_is_read(file):
    assert load_hardware(file) == (machine(node_factor=1.5, step_seconds=1e-3), ABOUT)
    assert [path.name for path in file.parent.iterdir()] == ["machine.json"]


def test_a_file_is_named_wherever_a_preset_is(file):
    expected = machine(node_factor=1.5, step_seconds=1e-3)
    assert named_hardware(str(file)) == expected
    assert PlanOptions(hardware=str(file)).resolve("generic").hardware == expected
    assert PlanOptions().resolve(str(file)).hardware == expected
    stages = devices_of_stages([str(file), {"hardware": str(file), "memory": "1GiB"}], Mesh(pp=2))
    assert [stage.memory_bytes for stage in stages] == [expected.memory_bytes, 2**30]


DAMAGE = [
    (lambda d: d.update(version=2), "version: this autodist_fx reads version 1, not 2"),
    (lambda d: d.update(colour="red"), "colour: unknown field"),
    (lambda d: d.pop("runs"), "runs: missing"),
    (lambda d: d.update(runs=[]), "runs: expected one or more"),
    (lambda d: d["runs"].reverse(), "runs: expected one or more, by ascending ranks"),
    (lambda d: d["runs"][0].update(tables=d["runs"][0]["tables"][2:]), r"runs\[0\].tables: there is none of linear"),
    (lambda d: d["runs"][0]["tables"][0]["seconds"].pop(), r"runs\[0\].tables\[0\].seconds: .* 11 seconds for 12"),
    (lambda d: d["runs"][1]["tables"][3].update(axes=[[2.0, 1.0, 3.0]]), r"runs\[1\].tables\[3\].seconds: .*ascending"),
    (lambda d: d["runs"][0]["tables"][0].update(seconds="fast"), r"runs\[0\].tables\[0\].seconds: expected a list"),
    (lambda d: d["runs"][0]["tables"][0].update(seconds=[1e999]), r"runs\[0\].tables\[0\].seconds\[0\]: expected a f"),
    (lambda d: d["tp_link"]["tables"][0].update(axes=[[1e3, 1e5, 1e7]]), r"tp_link.tables\[0\].axes: 1 for all_reduce"),
    (lambda d: d["flops"].pop("float32"), "flops.float32: missing"),
    (lambda d: d.update(node_factor=0), "node_factor: expected a number above 0"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_file_is_refused_by_field(file, damage, message):
    data = json.loads(hardware_to_text(machine(), ABOUT))
    damage(data)
    file.write_text(json.dumps(data))
    message = rf"machine\.json is no measured machine: {message}.*; measure the machine again"
    with pytest.raises(PlanError, match=message):
        load_hardware(file)


def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path):
    for text in ("{", "[1]", '"x"'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(PlanError, match=r"x\.json"):
            load_hardware(tmp_path / "x.json")
    with pytest.raises(PlanError, match=r"cannot read the measured machine .*none\.json"):
        named_hardware(str(tmp_path / "none.json"))
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match="cannot write the measured machine"):
        save_hardware(machine(), ABOUT, tmp_path / "file" / "x.json")


def test_a_measured_machine_that_a_plan_names_is_the_one_at_hand(tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"version": PLAN_VERSION, "hardware": "measured-cpu-elsewhere"}))
    assert PlanOptions.from_file(plan).resolve("cpu-gloo").hardware is CPU_GLOO
    with pytest.raises(PlanError, match="measured-cpu-elsewhere was measured on some machine: name its file"):
        PlanOptions(hardware="measured-cpu-elsewhere").resolve("cpu-gloo")
