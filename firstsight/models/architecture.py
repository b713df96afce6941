"""Which of transformers' classes a checkpoint's `model_type` stands for, and what they say as they load."""

import logging

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.utils.logging import disable_progress_bar

from firstsight.models import egogpt  # noqa: F401 - makes the auto classes know it

# A bar for each load and each save, which take seconds; a table of weights that do not fit, which we say in one line;
# and layers that no one asked to be shared out.
disable_progress_bar()
for _name in ("modeling_utils", "distributed.tensor_parallel"):
    logging.getLogger(f"transformers.{_name}").setLevel(logging.ERROR)


def auto_class(model_type: str | None) -> type | None:
    """The Auto class that builds such a model: of those that see, or else of text-only ones; None if there is none."""
    # Its get() knows nothing: it is filled as classes are asked for.
    config = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None  # noqa: SIM401
    if config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM if config in MODEL_FOR_CAUSAL_LM_MAPPING else None
