"""Say how a model is quantized, and see to it that it is what was asked for."""

import json
import logging
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from firstsight.core.stage import log
from firstsight.models import int4

# It warns for every layer that inputs are cast to float16, which LLM.int8 always does.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# The vision tower loses most from 8 and 4 bits and has the fewest weights. Full names, because "visual" alone would not
# match the tower's blocks; lm_head too, because naming any module replaces the default list, which skips it.
MODULES_NOT_QUANTIZED = ["model.visual", "model.vision_tower", "model.multi_modal_projector", "lm_head"]


def quantization_config(method: str, compute_dtype: torch.dtype, double: bool = True) -> BitsAndBytesConfig:
    """Return bitsandbytes' settings for "int8" (LLM.int8) or "nf4" (by default with double quantization)."""
    if method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=MODULES_NOT_QUANTIZED)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=MODULES_NOT_QUANTIZED,
    )


def stored_method(folder: Path) -> str | None:
    """Return the method by which the weights in `folder` are quantized: "int8", "nf4", "int4", "fp4", or None."""
    try:
        quantized = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None  # loading it reports what is wrong
    if not quantized:
        return None
    if int4.is_int4(quantized):
        return "int4"
    return "int8" if quantized.get("load_in_8bit") else quantized.get("bnb_4bit_quant_type", "fp4")


def language_model_prefix(model: PreTrainedModel) -> str:
    """Return the prefix, dot included, of the names of the language model's modules; vision modules lack it."""
    base = model.base_model_prefix
    return f"{base}.language_model." if hasattr(model.base_model, "language_model") else f"{base}."


def quantized_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the layers of a model that are quantized, by whichever method, by name."""
    kinds: tuple[type, ...] = (int4.Int4Linear,)
    if "bitsandbytes" in sys.modules:  # else no model has layers of it
        from bitsandbytes.nn import Linear4bit, Linear8bitLt

        kinds += (Linear4bit, Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def check_quantized(model: PreTrainedModel) -> dict[str, int]:
    """Count quantized and other linear layers, and check where they are: a misspelt module to skip fails silently.

    Raises:
        RuntimeError: a layer outside the language model was quantized, or none was.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantized = quantized_layers(model)
    wrong = [name for name in quantized if not name.startswith(language_model_prefix(model))]
    if wrong or not quantized:
        raise RuntimeError(
            f"expected quantized layers in the language model only, found {len(quantized)}, and {wrong[:3]} outside it"
        )
    return {"quantized_layers": len(quantized), "kept_layers": len(linear) - len(quantized)}


def keep_weights_as_stored(model: nn.Module) -> None:
    """Prevent bitsandbytes from repacking the 4-bit weights of a model on the CPU.

    On a processor with AVX-512-BF16, `Linear4bit` of bitsandbytes 0.50.2 replaces its weights at the first forward pass
    in eval mode: scales become bfloat16, and products are computed in bfloat16, whatever `compute_dtype` says. That
    raises unless a layer has a multiple of 32 rows and of 64 columns; saving afterwards stores the rounded scales;
    training afterwards gets no gradient through the layer. Without repacking, every processor computes from the weights
    as stored, in `compute_dtype`, and results of one machine hold on another. Remove this function when the library
    computes layers of every shape in `compute_dtype` (`_convert_weight_packed_for_cpu` in its functional.py).
    """
    from bitsandbytes.nn import Linear4bit  # absent where nothing is quantized

    repacked = [m for m in model.modules() if isinstance(m, Linear4bit) and m.support_avx512bf16_for_cpu]
    for module in repacked:
        module.support_avx512bf16_for_cpu = False
    if repacked:
        log.info(
            "nf4: %d layers compute from their weights as stored; bitsandbytes' faster path for this processor, "
            "AVX-512-BF16, rounds them to bfloat16 and fails on some widths",
            len(repacked),
        )
