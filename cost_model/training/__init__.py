"""Predicts a training step: forward and backward passes on a schedule, gradients over replicas, the optimizer, memory."""
