"""A running rank's training step: its schedule, its stages' passes forward and backward, what is owed of gradients."""
