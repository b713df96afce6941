"""Load models from Hugging Face folders."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from firstsight.core.errors import UserError
from firstsight.core.variants import METHODS
from firstsight.models import int4
from firstsight.models.architecture import auto_class, in_head, is_encoder
from firstsight.models.device import auto_dtype
from firstsight.models.heads import fresh_random, head_arguments, renew_head
from firstsight.models.model_folder import folder_error, read_config
from firstsight.models.quantized import (
    check_quantized,
    keep_weights_as_stored,
    language_model_prefix,
    quantization_config,
    stored_method,
)
from firstsight.models.text_attention import attend_causally_first
from firstsight.models.vision_attention import attend_by_size

# The subfolder of a model folder that holds the model's adapter.
ADAPTER = "adapter"

# Bytes: the length of a cache line, and the alignment of torch's own allocator.
_ALIGNMENT = 64


def load_model(
    folder: Path,
    precision: str,
    device: str,
    double_quantization: bool = True,
    compute_dtype: str = "auto",
    classes: Sequence[str] = (),
    roundings: Mapping[str, int4.Rounding] | None = None,
) -> PreTrainedModel:
    """Load the folder's model on `device`, in eval mode.

    The architecture is the config's: any of transformers' image-text models, a text-only language model, or an encoder
    with a classification head. The folder's adapter, if it has one, is merged; over weights quantized by bitsandbytes
    it stays separate.

    Args:
        precision: "float32", "bfloat16" or "float16"; "int8", "nf4" or "int4" quantizes the language model alone on
            loading; "auto" is bfloat16 on CUDA (float16 on GPUs without it), float32 on the CPU, and the stored
            precision for a quantized folder.
        double_quantization: for "nf4", whether its scales are quantized too.
        compute_dtype: for "nf4", the dtype of its matrix products; "auto" is that of the other weights.
        classes: names of the classes, which an encoder needs: if it has no head for these (`has_head`), it gets a new
            one, with the same random weights every time.
        roundings: for "int4", how layers are rounded, by name; others are rounded to the nearest.

    Raises:
        UserError: an encoder has no classes, or is to be quantized; the folder lacks files, a file is broken, weights
            are missing or of another shape, transformers does not know the architecture, the folder is quantized by a
            method other than `precision`, or has an adapter over weights in int4.
        RuntimeError: a layer outside the language model was quantized, or none was: a defect, not a user's mistake.
    """
    if not folder.is_dir():  # as in `load_processor`
        raise folder_error(folder, "no folder")
    if (stored := stored_method(folder)) and precision not in ("auto", stored):
        raise UserError(
            f"{folder}: expected weights that can be loaded as {precision}, found them quantized to {stored}; set the "
            "precision to auto, leave this method out, or take the model that it was quantized from"
        )
    if stored == "int4" and (folder / ADAPTER).is_dir():
        raise UserError(
            f"{folder}: expected int4 weights without an adapter, found {ADAPTER}/; take the model that they were "
            "quantized from, whose adapter is merged before"
        )
    quantizing = precision in METHODS and not stored
    # By the functions of `int4`, once the model is loaded; transformers does the rest with bitsandbytes.
    rounding = quantizing and precision == "int4"
    by_bitsandbytes = (quantizing or stored) and not rounding and stored != "int4"
    config = read_config(folder)
    head = head_arguments(folder, config, classes, precision) if is_encoder(config.model_type) else {}
    try:
        dtype = _dtype(precision, device, config)
        # Not passed as None, which would undo the quantization that a quantized folder declares.
        quantization = {}
        if quantizing and by_bitsandbytes:
            computed = dtype if compute_dtype == "auto" else getattr(torch, compute_dtype)
            quantization["quantization_config"] = quantization_config(precision, computed, double_quantization)
        if stored == "int4":
            quantization["config"] = config
        with fresh_random() if head else nullcontext(), int4.loading(config) if stored == "int4" else nullcontext():
            model, info = auto_class(config.model_type).from_pretrained(
                folder,
                dtype=dtype,
                # To be rounded layer by layer, so that a GPU need not have room for 16 bits.
                device_map="cpu" if rounding else device,
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,  # without asking the user
                **head,
                **quantization,
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever libraries raise over a damaged file
        raise folder_error(folder, error) from None
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if head:
        missing = [name for name in missing if not in_head(name.lstrip("('"), model.base_model_prefix)]
    if missing:
        raise folder_error(folder, f"no fitting weight for {missing[0]} and {len(missing) - 1} more")
    if head:
        renew_head(model)
    if stored == "int4":
        int4.loaded(model, config)
    if device == "cpu":
        if by_bitsandbytes:
            keep_weights_as_stored(model)
        align_weights(model)
    attend_by_size(model)
    attend_causally_first(model)
    if (folder / ADAPTER).is_dir():
        model = _with_adapter(model, folder / ADAPTER, merge=not by_bitsandbytes)
    if rounding:
        int4.quantize(model, language_model_prefix(model), device, roundings or {})
        model.to(device)
    if quantizing:
        check_quantized(model)
    if device == "cuda" and (rounding or stored == "int4"):
        int4.take_kernel(model)
    return model.eval()


def int4_misfit(folder: Path) -> str | None:
    """Return why int4 does not round the language model in `folder`, or None; its weights are not read.

    Raises:
        UserError: the folder's config cannot be used.
    """
    config = read_config(folder)
    with torch.device("meta"):
        model = auto_class(config.model_type).from_config(config)
    return int4.misfit(model, language_model_prefix(model))


def align_weights(model: nn.Module) -> None:
    """Copy float weights and buffers on the CPU to addresses that are multiples of 64 bytes, where they are not.

    Weights of a safetensors file are used where they lie, at addresses that depend on the length of its header. Sums
    and products may round differently by address (Intel's notes on conditional numerical reproducibility ask for 64
    bytes), and LLM.int8 turns such a difference of 1e-6 into one of 1e-2 where an activation then rounds to another of
    its 255 levels: a model and its saved copy would answer differently.
    """
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point() and tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()


def _dtype(precision: str, device: str, config: PretrainedConfig) -> torch.dtype | str:
    """Return the dtype of weights that are not quantized; on the CPU, if others are quantized, the checkpoint's."""
    if precision not in ("auto", *METHODS):
        return getattr(torch, precision)
    quantized = precision in METHODS or hasattr(config, "quantization_config")
    if quantized and device == "cpu" and config.dtype:
        return config.dtype
    return auto_dtype(device)


def _with_adapter(model: PreTrainedModel, folder: Path, merge: bool) -> PreTrainedModel:
    """Load the adapter in `folder` over the model, and merge it into the weights if asked to."""
    from peft import PeftModel, get_peft_model_state_dict  # takes seconds to import, and few models have an adapter

    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:  # else peft would accept a pickle
            found = set(file.keys())
        adapted: Any = PeftModel.from_pretrained(model, folder)
    except Exception as error:  # whatever libraries raise over a damaged file
        raise folder_error(folder, error) from None
    if missing := sorted(set(get_peft_model_state_dict(adapted)) - found):
        raise folder_error(folder, f"no weight for {missing[0]} and {len(missing) - 1} more")
    return adapted.merge_and_unload() if merge else adapted.get_base_model()
