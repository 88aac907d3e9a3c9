"""A machine that was measured is what plans are predicted for; what is said in the environment comes first."""

import pytest
import torch
from huggingface_hub import constants

import autodist_fx as adx
from autodist_fx.runtime.default_hardware import default_hardware, machine_name, measured_file
from cost_model.errors import PlanError
from cost_model.request.hardware_file import About, save_hardware
from tests.support.models import tiny_config
from tests.support.plans.measured import machine


@pytest.fixture
def unmeasured(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.delenv("ADX_HARDWARE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


def save(hardware):
    save_hardware(hardware, About("2026-11-27", "AMD EPYC", "2.13.0"), measured_file("cpu"))


def test_a_preset_where_nothing_was_measured(unmeasured, monkeypatch):
    assert default_hardware() == "cpu-gloo"
    monkeypatch.setenv("ADX_HARDWARE", "h100")
    assert default_hardware() == "h100"


def test_the_machine_where_it_was_measured(unmeasured, monkeypatch):
    save(machine())
    assert measured_file("cpu") == unmeasured / "autodist_fx" / "hardware" / f"{machine_name('cpu')}.json"
    assert default_hardware() == machine()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert default_hardware() == "cpu-gloo"  # links between machines were not measured


def test_a_plan_says_which_it_used(unmeasured):
    plan = adx.compile(tiny_config("llama"), tp=2, verify=False).plan
    assert plan.hardware == "cpu-gloo"
    save(machine(name="measured-cpu-by-law"))
    measured = adx.compile(tiny_config("llama"), tp=2, verify=False).plan
    assert measured.hardware == "measured-cpu-by-law"
    assert "(2 ranks of measured-cpu-by-law)" in str(measured)
    assert measured.predicted_seconds != plan.predicted_seconds


def test_a_damaged_file_is_an_error_and_no_silent_preset(unmeasured):
    save(machine())
    measured_file("cpu").write_text("{}")
    with pytest.raises(PlanError, match="version: missing; measure the machine again"):
        default_hardware()
