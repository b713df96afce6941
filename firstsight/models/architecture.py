"""Find the transformers class for a checkpoint's `model_type`, and a model's linear layers.

Also silences what transformers prints as it loads.
"""

import logging
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

from firstsight.models import egogpt  # noqa: F401 - registers EgoGPT with the auto classes

# Silenced: progress bars of loads and saves, which take seconds; tables of mismatched weights, which
# `firstsight.models.loading` reports in one line; warnings about tensor parallelism, which is not used; and that a text
# is too long, which `firstsight.packing.positions` says of the record.
disable_progress_bar()
for _name in ("modeling_utils", "distributed.tensor_parallel", "tokenization_utils_base"):
    logging.getLogger(f"transformers.{_name}").setLevel(logging.ERROR)


def auto_class(model_type: str | None) -> type | None:
    """Return the Auto class that builds such a model; None if there is none.

    It is image-text-to-text before causal LM, and sequence classification for an encoder.
    """
    if is_encoder(model_type):
        return AutoModelForSequenceClassification
    # CONFIG_MAPPING is filled lazily, so its get() finds nothing.
    config = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None  # noqa: SIM401
    if config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM if config in MODEL_FOR_CAUSAL_LM_MAPPING else None


def is_encoder(model_type: str | None) -> bool:
    """Return whether such a model is an encoder alone, as BERT: it can tell classes apart, but gives no text.

    That is a masked language model without a decoder, though transformers has a causal form of some of them.
    """
    config = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None  # noqa: SIM401
    classifies = config in MODEL_FOR_MASKED_LM_MAPPING and config in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    shows = config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return classifies and not shows and not getattr(config, "is_encoder_decoder", False)


def in_head(name: str, prefix: str) -> bool:
    """Return whether a weight is one of an encoder's head, which is made for the classes, or of its pooler.

    A checkpoint of a masked language model has another head, and some have no pooler.
    """
    return not name.startswith(f"{prefix}.") or ".pooler." in name


def draws_random_numbers(module: nn.Module) -> bool:
    """Return whether a module, or one within it, draws random numbers in training: for dropout, or a router's noise."""

    def draws(one: nn.Module) -> bool:
        shares = [value for name, value in vars(one).items() if "drop" in name or "noise" in name]
        return (isinstance(one, _DropoutNd) and one.p > 0) or any(isinstance(s, float) and s > 0 for s in shares)

    return any(map(draws, module.modules()))


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers within a module by name, GPT-2's `Conv1D`, which are linear layers too, among them."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, Conv1D))}


def sides(layer: Any) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a linear layer."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return layer.in_features, layer.out_features
