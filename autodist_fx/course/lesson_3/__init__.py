"""Lesson 3: column parallel, row parallel, and the all_reduce behind them."""
