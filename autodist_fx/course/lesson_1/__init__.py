"""Lesson 1: two ranks and one model; send and recv."""
