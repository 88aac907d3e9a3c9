"""The differences between versions of transformers while a model generates, a module per version's generate.

`GenerationHooks` is chosen by what GenerationMixin has, not by a version number:

    cache_position.py    4.57 and 5.0: a step is the tokens at `cache_position`; positions are made of the mask at each
                         step
    sequence_length.py   later 5: a step is the last `next_sequence_length` tokens; positions come with them; a mask of
                         ones is left out

What generate calls the cache is calls/cache_names.py's to say; what a cache's `crop` means, the cache's own layers'.
"""

from __future__ import annotations

import inspect

from transformers import GenerationMixin

if "next_sequence_length" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
    from autodist_fx.runtime.generation.versions.sequence_length import GenerationHooks
else:
    from autodist_fx.runtime.generation.versions.cache_position import GenerationHooks

__all__ = ["GenerationHooks"]
