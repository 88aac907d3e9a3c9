"""The numeric half of `verify`: every rank's program runs in float64
on drawn weights, and is compared with the model's own graph.

    factored.py             weights of any size as products of two thin matrices
    float64_interpreter.py  runs a graph in float64, whatever dtypes it was traced in
    example_values.py       inputs for a graph, drawn from its input specs
    check.py                compares one call
    gradients.py            compares the gradients of one call
    locate.py               finds the first node that differs
    verify_numeric.py       runs a call, or a prompt and a step
"""
