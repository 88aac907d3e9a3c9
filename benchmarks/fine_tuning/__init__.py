"""Training measured: the loss of each step against one process, and seconds a step against other ways to train."""
