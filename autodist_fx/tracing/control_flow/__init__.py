"""Python's ifs, loops and numbers while tracing."""
