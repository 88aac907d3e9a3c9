"""Trains a model split over a mesh: the engine, in one process or over many."""
