"""Runs rank programs: all of them in this process (`simulate`), or one per process over torch.distributed."""
