"""The tasks that are covered, and the types of transformers' mapping of each."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.models.auto import modeling_auto

SWEEPS = ("generation", "calls")  # over rank threads; see model_coverage/sweeps


@dataclass(frozen=True, slots=True)
class Task:
    """One of transformers' mappings from a model type to the name of a model class."""

    name: str
    title: str
    mapping: str  # its name in transformers.models.auto.modeling_auto
    decodes: bool = False  # whether decoding with a KV cache is checked
    sweeps: tuple[str, ...] = ()  # of SWEEPS

    def types(self) -> dict[str, str]:
        """Model type -> class name. Of several classes (with and without a teacher, say) the first one."""
        classes = getattr(modeling_auto, self.mapping)
        return {name: found if isinstance(found, str) else found[0] for name, found in classes.items()}


TASKS = {
    task.name: task
    for task in (
        Task("causal-lm", "Causal language models", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", True, SWEEPS),
        Task("seq2seq-lm", "Sequence to sequence", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", True, SWEEPS),
        Task("masked-lm", "Masked language models", "MODEL_FOR_MASKED_LM_MAPPING_NAMES", sweeps=("calls",)),
        Task(
            "sequence-classification",
            "Sequence classification",
            "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
            sweeps=("calls",),
        ),
        Task("image-classification", "Image classification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
        Task("speech-seq2seq", "Speech to text", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", True, ("generation",)),
        Task("two-tower", "Image and text towers", "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    )
}
