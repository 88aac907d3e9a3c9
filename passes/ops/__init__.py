"""Functions and modules of ours that emitted graphs call."""
