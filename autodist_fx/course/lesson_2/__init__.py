"""Lesson 2: stages; where to cut a model, and what crosses a cut."""
