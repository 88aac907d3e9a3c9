"""Differences between the versions of transformers while a model is traced, a module per concern.

Each is chosen by what transformers has, not by its version number:

    tracer_base.py     the tracer that ours is built on: HFTracer (4.57; hf_tracer.py mends it), or own_tracer.py (5)
    masks.py           how masks are made without vmap
    sliding_layers.py  sliding layers among recurrent ones
    convolution_states.py  prompts shorter than a convolution's kernel
    capturing_hooks.py transformers' own hooks, by which it captures outputs
    forwards.py        names of the cache argument, wrappers around forward, building without initialising
"""
