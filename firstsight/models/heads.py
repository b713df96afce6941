"""Give an encoder the classification head that its classes need."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from firstsight.core.errors import UserError
from firstsight.core.variants import METHODS
from firstsight.models.model_folder import read_config


def has_head(folder: Path, classes: Sequence[str]) -> bool:
    """Return whether the encoder in `folder` has a classification head for these classes, in this order."""
    config = read_config(folder)
    made_for = [name.endswith("ForSequenceClassification") for name in config.architectures or ()]
    return any(made_for) and [config.id2label[number] for number in sorted(config.id2label)] == list(classes)


def head_arguments(folder: Path, config: PretrainedConfig, classes: Sequence[str], precision: str) -> dict[str, Any]:
    """Return what `from_pretrained` needs to give an encoder a new head for the classes; {} where it has theirs.

    Raises:
        UserError: there are no classes, or the precision is a method of quantization.
    """
    if not classes:
        raise UserError(
            f"{folder}: expected a model that answers in text, found an encoder ({config.model_type}), which tells "
            "classes apart; name them in data.classes, or take a causal language model"
        )
    if precision in METHODS:
        raise UserError(
            f"{folder}: expected a model whose language model can be quantized to {precision}, found an encoder "
            f"({config.model_type}); leave {precision} out"
        )
    if has_head(folder, classes):
        return {}
    names = dict(enumerate(classes))
    return {"id2label": names, "label2id": {name: n for n, name in names.items()}, "ignore_mismatched_sizes": True}


def renew_head(model: PreTrainedModel) -> None:
    """Draw the weights of an encoder's head, which may be those of as many other classes, the same ones every time."""
    with fresh_random():
        for name, module in model.named_children():
            if name != model.base_model_prefix:
                for parameter in module.parameters():
                    parameter._is_hf_initialized = False  # else transformers keeps what was loaded
                module.apply(model._init_weights)


@contextmanager
def fresh_random() -> Iterator[None]:
    """Make the random numbers within the block the same every time, and those after it as if it had not been."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
