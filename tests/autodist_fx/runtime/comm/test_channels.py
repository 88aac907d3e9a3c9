"""Reserved channels: one place writes them, and none is a hop's."""

import itertools
import re
from pathlib import Path

import pytest

import autodist_fx
from autodist_fx.runtime.comm.channels import Channel, channel_text
from cost_model.plan.data import HOP_CHANNELS

SOURCES = Path(autodist_fx.__file__).parent


def test_no_channel_is_a_hops_and_all_are_tags_of_gloo() -> None:
    taken = [range(channel, channel + 1) for channel in Channel if channel is not Channel.GRADIENTS]
    taken += [range(HOP_CHANNELS), range(Channel.GRADIENTS, Channel.GRADIENTS + HOP_CHANNELS)]  # one a hop
    taken.sort(key=lambda channels: channels.start)
    assert all(a.stop <= b.start for a, b in itertools.pairwise(taken))
    assert taken[-1].stop <= 2**31


def test_one_file_writes_them() -> None:
    written = re.compile(r"0x7[fF]0|(CHANNEL|TAG)S?\s*=\s*\d")
    found = [path.relative_to(SOURCES) for path in SOURCES.rglob("*.py") if written.search(path.read_text("utf-8"))]
    assert found == [Path("runtime/comm/channels.py")]


@pytest.mark.parametrize(
    ("channel", "text"),
    [(3, "3"), (Channel.STEPS, "2130706434 (STEPS)"), (int(Channel.OUTPUTS), "2130706435 (OUTPUTS)"),
     (HOP_CHANNELS + 3, "16777219 (GRADIENTS of hop 3)"), (HOP_CHANNELS - 1, "16777215")],
)  # fmt: skip
def test_errors_name_a_channel(channel: int, text: str) -> None:
    assert channel_text(channel) == text
