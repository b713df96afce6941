"""Loading models and processors from Hugging Face folders: the one place that decides device and precision."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from firstsight.core.errors import UserError
from firstsight.core.stage import log
from firstsight.models import egogpt  # noqa: F401 - makes the auto classes know it

# It says at every layer that inputs are cast to float16, which is what LLM.int8 does.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# The vision tower loses most from 8 and 4 bits and holds least of the weights; "visual" alone would not match its
# blocks, and naming any module drops the default that skips the head.
KEPT_IN_HIGH_PRECISION = ["model.visual", "lm_head"]

_SENTENCE = "What is in the cup?"


def pick_device(wanted: str) -> str:
    """ "cuda" or "cpu" for `runtime.device`; "auto" takes CUDA where there is any, and says what it took.

    Of several processes, each gets a GPU of its own as its "cuda", or its share of the CPU's threads.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("runtime.device: expected a CUDA device, found none; set it to auto or cpu")
    device = "cuda" if available and wanted != "cpu" else "cpu"
    state = PartialState(cpu=device == "cpu")
    if device == "cuda":
        log.info("running on %s", torch.cuda.get_device_name(state.device))
    else:
        # `accelerate launch` leaves each process one thread; share out all that this machine gives us.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // state.num_processes))
        log.info("running on the CPU, %d threads", torch.get_num_threads())
    return device


def load_processor(folder: Path) -> ProcessorMixin:
    """The folder's processor: tokenizer, image and video processor, chat template."""
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        read_back = processor.tokenizer.decode(processor.tokenizer(_SENTENCE)["input_ids"], skip_special_tokens=True)
        turns = [{"role": role, "content": [{"type": "text", "text": _SENTENCE}]} for role in ("user", "assistant")]
        rendered = processor.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # whatever libraries raise over a damaged file
        raise _broken(folder, error) from None
    # Without its vocabulary a tokenizer still loads, and reads nothing.
    if read_back != _SENTENCE:
        raise _broken(folder, f"a tokenizer that reads {_SENTENCE!r} as {read_back!r}")
    # An answer is taught as its text and this token; another would never end it.
    end = processor.tokenizer.eos_token
    if f"{_SENTENCE}{end}" not in rendered:
        raise _broken(folder, f"a chat template that does not end a turn with the eos_token {end!r}: {rendered!r}")
    return processor


def load_model(folder: Path, precision: str, device: str) -> PreTrainedModel:
    """The folder's model, on `device`, in eval mode.

    Args:
        precision: "float32" or "bfloat16"; "int8" or "nf4" quantises on loading, all but vision tower and head;
            "auto" is bfloat16 on CUDA and float32 on the CPU, and what a folder of a quantised model says it is.

    Raises:
        UserError: the folder lacks files, a file is broken, or weights are missing or of another shape.
    """
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(precision)
    if dtype is None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
    # Left out where there is none: None would undo the quantisation that a quantised folder declares.
    quantization = (
        {"quantization_config": quantization_config(precision, dtype)} if precision in ("int8", "nf4") else {}
    )
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            device_map=device,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            **quantization,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever libraries raise over a damaged file
        raise _broken(folder, error) from None
    if absent := sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"]):
        raise _broken(folder, f"no fitting weight for {absent[0]} and {len(absent) - 1} more")
    return model.eval()


def quantization_config(method: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """bitsandbytes settings for "int8" (LLM.int8) or "nf4" (with double quantisation)."""
    if method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=KEPT_IN_HIGH_PRECISION)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=KEPT_IN_HIGH_PRECISION,
    )


def _broken(folder: Path, found: Any) -> UserError:
    first_line = " ".join(str(found).split())[:200]
    return UserError(
        f"{folder}: expected a complete Hugging Face model folder, found {first_line}; "
        "make it again (dvc repro) or restore it (dvc checkout)"
    )
