"""Predictions of plans beside what they take: the points, a rank's side, the figures."""
