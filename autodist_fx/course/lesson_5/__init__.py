"""Lesson 5: training on a pipeline; the 1F1B schedule."""
