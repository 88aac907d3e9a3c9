"""Predicts a training step: passes on a schedule, gradients over replicas, the optimizer; seconds and memory."""
