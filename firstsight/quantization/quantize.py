"""Quantising a model folder with bitsandbytes into another that `from_pretrained` loads quantised."""

from pathlib import Path

from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import PreTrainedModel

from firstsight.models.loading import KEPT_IN_HIGH_PRECISION, load_model, load_processor

_QUANTISED = (Linear8bitLt, Linear4bit)


def quantize_folder(source: Path, target: Path, method: str, device: str) -> dict[str, int]:
    """Load `source` as "int8" or "nf4", save it with its processor in `target`, and count linear layers by kind.

    Raises:
        RuntimeError: a layer that should keep its precision was quantised, or none was; never expected.
    """
    model = load_model(source, method, device)
    counts = check_layers(model)
    model.save_pretrained(target)
    load_processor(source).save_pretrained(target)
    return counts


def check_layers(model: PreTrainedModel) -> dict[str, int]:
    """Number of quantised and of other linear layers. Names of modules to skip fail silently, so types are asserted."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantised = {name for name, module in linear.items() if isinstance(module, _QUANTISED)}
    wrong = [name for name in quantised if name.startswith(tuple(KEPT_IN_HIGH_PRECISION))]
    if wrong or not quantised:
        raise RuntimeError(
            f"expected quantised layers outside {KEPT_IN_HIGH_PRECISION} only, "
            f"found {len(quantised)} in all and {wrong[:3]} inside"
        )
    return {"quantized_layers": len(quantised), "kept_layers": len(linear) - len(quantised)}
