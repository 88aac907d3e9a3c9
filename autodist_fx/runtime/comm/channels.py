"""`Channel`: every channel that is the runtime's own, and no hop's of a plan.

A message between two ranks is told from others by its channel (a tag, to Gloo; NCCL goes by order alone). The hops of a
plan have the channels below HOP_CHANNELS, which cost_model/plan/read_json.py and search/check_plan.py see to. What the
runtime says beside the graphs goes on the channels here, one a purpose, so that no message is taken for another's.
"""

from __future__ import annotations

from enum import IntEnum, unique

from cost_model.plan.data import HOP_CHANNELS


@unique
class Channel(IntEnum):
    """The reserved channels, all of 31 bits: a tag of Gloo's is an int32."""

    GRADIENTS = HOP_CHANNELS  # and as many above it: plus the channel of the hop whose tensor's gradient goes back
    GRADIENT_SUMS = 2 * HOP_CHANNELS  # terms of a gradient that several ranks owe
    TP_EXCHANGE = 0x7F000001  # shards of a collective; on the tp group, which may be the world
    STEPS = 0x7F000002  # what the leader of a generation says
    OUTPUTS = 0x7F000003  # of a stage, on their way to the others
    AGREEMENT = 0x7F000004  # what ranks compare before they start together
    ENCODER_INPUTS = 0x7F000005
    STATES = 0x7F000006  # of a model with a cache of its own, on their way to another stage
    CALLS = 0x7F000007  # whether all ranks were called alike, and ended well
    STEP_TOTALS = 0x7F000009  # loss and norm of a training step
    PARAMETERS = 0x7F00000A  # on their way to where they are gathered
    STEP_INPUTS = 0x7F00000B  # of a step of a generation, beside tokens: images, sounds
    BREAK = 0x7F000008  # on which nothing is ever sent: who waits there ends every wait (dist_communicator.py)


_NAMES = {int(channel): channel.name for channel in Channel}


def channel_text(channel: int) -> str:
    """Format a channel as errors name it: "3" for a hop's, "2130706434 (STEPS)" for one of ours."""
    if Channel.GRADIENTS <= channel < Channel.GRADIENTS + HOP_CHANNELS:
        return f"{channel:d} (GRADIENTS of hop {channel - Channel.GRADIENTS:d})"
    name = _NAMES.get(channel)
    return f"{channel:d}" if name is None else f"{channel:d} ({name})"
