"""The numeric half of `verify`: every rank's program run in float64 on drawn weights, and compared with the model's
own graph.

    factored.py             weights of any size as products of two thin matrices
    float64_interpreter.py  runs a graph in float64, whatever it was traced in
    example_values.py       inputs for a graph, made up from its forms
    check.py                one call, compared
    gradients.py            the gradients of one call, compared
    locate.py               the first node that differs
    verify_numeric.py       a call, or a prompt and a step
"""
