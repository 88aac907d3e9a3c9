"""`run` prints what was predicted of a step beside what it took, where the prediction is of this machine."""

from dataclasses import replace

from autodist_fx.cli.generation.forecast import forecast_text
from tests.support.plans.examples import small_plan


def test_a_step_of_the_measured_machine_is_predicted_behind_the_plans_tokens() -> None:
    plan = replace(small_plan(), hardware="measured-cpu-x", sizes=(("B", 2), ("S", 1), ("P", 512)))
    expected = f" (predicted {sum(stage.seconds for stage in plan.stages) * 1e3:.1f} behind 512)"
    assert forecast_text(plan, 2) == expected
    assert forecast_text(replace(plan, hardware="cpu-gloo"), 2) == ""  # not this machine
    assert forecast_text(plan, 1) == ""
    assert forecast_text(replace(plan, sizes=(("B", 2), ("S", 128))), 2) == ""
    assert forecast_text(None, 2) == ""
