"""Runs a rank's programs over torch.distributed: what a running rank needs, and nothing else."""
