"""Load models and processors from Hugging Face folders; device and precision are decided here and nowhere else."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from firstsight.core.cores import cores
from firstsight.core.errors import UserError
from firstsight.core.processes import processes_here
from firstsight.core.stage import log
from firstsight.core.variants import METHODS
from firstsight.models.architecture import auto_class, in_head, is_encoder
from firstsight.models.text_processor import EncoderProcessor, TextProcessor
from firstsight.models.vision_attention import attend_by_size

# It warns for every layer that inputs are cast to float16, which LLM.int8 always does.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# The vision tower loses most from 8 and 4 bits and has the fewest weights. Full names, because "visual" alone would not
# match the tower's blocks; lm_head too, because naming any module replaces the default list, which skips it.
MODULES_NOT_QUANTIZED = ["model.visual", "model.vision_tower", "model.multi_modal_projector", "lm_head"]
# The precision in which each method of training loads a model: float32 for weights that are trained themselves.
TRAINING_PRECISIONS = {"full": "float32", "lora": "auto", "adalora": "auto", "qlora": "nf4"}
# The subfolder of a model folder that holds the model's adapter.
ADAPTER = "adapter"

# Bytes: the length of a cache line, and the alignment of torch's own allocator.
_ALIGNMENT = 64

RESTORE_REMEDY = "make it again (dvc repro) or restore it (dvc checkout)"

_SENTENCE = "What is in the cup?"


def pick_device(wanted: str) -> str:
    """Return "cuda" or "cpu" for `runtime.device`, and log it; "auto" is CUDA where available.

    With several processes, each gets a GPU of its own as its "cuda", or its share of the CPU's threads.

    Raises:
        UserError: "cuda" is wanted and not available.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("runtime.device: expected a CUDA device, found none; set it to auto or cpu")
    device = "cuda" if available and wanted != "cpu" else "cpu"
    state = PartialState(cpu=device == "cpu")
    if device == "cuda":
        place = torch.cuda.get_device_name(state.device)
    else:
        # `accelerate launch` leaves each process one thread; divide all that those on this machine may use.
        torch.set_num_threads(max(1, cores() // processes_here()))
        place = f"the CPU, {torch.get_num_threads()} threads"
    log.info("running on %s%s", place, f", in {state.num_processes} processes" if state.num_processes > 1 else "")
    if device == "cuda" and not has_bfloat16(device):
        log.info("it computes no bfloat16: precision auto is float16, and training computes in float32")
    return device


def has_bfloat16(device: str) -> bool:
    """Return whether the device computes in bfloat16: NVIDIA's GPUs do from compute capability 8.0 (Ampere)."""
    return device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)


def auto_dtype(device: str) -> torch.dtype:
    """Return what the precision "auto" means on a device, for weights that are not quantized."""
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if has_bfloat16(device) else torch.float16


def training_precision(method: str, device: str) -> str:
    """Return the precision in which a method of training loads a model on the device.

    Without bfloat16 it is float32 for adapters too: gradients of float16 would be rounded to zero.

    Raises:
        UserError: `method` is qlora on a GPU without bfloat16.
    """
    if device == "cuda" and not has_bfloat16(device):
        if method == "qlora":
            raise UserError(
                f"method: expected full, lora or adalora on {torch.cuda.get_device_name()}, which computes no "
                "bfloat16, found qlora; set method to lora"
            )
        return "float32"
    return TRAINING_PRECISIONS[method]


def load_processor(
    folder: Path, place: str = "", remedy: str = RESTORE_REMEDY
) -> ProcessorMixin | TextProcessor | EncoderProcessor:
    """Load the folder's processor: tokenizer, image and video processor, chat template; of an encoder the tokenizer.

    Raises:
        UserError: the processor is unusable; the message names the folder as `place` (empty: its path) and ends with
            `remedy`.
    """
    place = place or str(folder)
    if not folder.is_dir():  # transformers would look for it on the hub
        raise _load_error(place, "no folder", remedy)
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if isinstance(processor, PreTrainedTokenizerBase):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if is_encoder(config.model_type):
                return _encoder_processor(processor, getattr(config, "max_position_embeddings", None))
            processor = TextProcessor(processor, config)
        read_back = processor.tokenizer.decode(processor.tokenizer(_SENTENCE)["input_ids"], skip_special_tokens=True)
        turns = [{"role": role, "content": [{"type": "text", "text": _SENTENCE}]} for role in ("user", "assistant")]
        rendered = processor.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # whatever libraries raise over a damaged file
        raise _load_error(place, error, remedy) from None
    # A tokenizer without its vocabulary still loads, and encodes to nothing.
    if read_back != _SENTENCE:
        raise _load_error(place, f"a tokenizer that reads {_SENTENCE!r} as {read_back!r}", remedy)
    if found := _unusable_end(folder, processor.tokenizer, rendered):
        raise _load_error(place, found, remedy)
    videos = getattr(processor, "video_processor", None)
    if getattr(videos, "cap_pixels_per_frame", False) is None:
        # Frames were resized when the data set was built; None makes transformers warn in every process.
        videos.cap_pixels_per_frame = False
    return processor


def _encoder_processor(tokenizer: PreTrainedTokenizerBase, positions: int | None) -> EncoderProcessor:
    """Return the processor of an encoder. Raises ValueError if the tokenizer reads text as unknown words."""
    ids = tokenizer(_SENTENCE, add_special_tokens=False)["input_ids"]
    if not ids or all(one == tokenizer.unk_token_id for one in ids):
        raise ValueError(f"a tokenizer that reads {_SENTENCE!r} as unknown words")
    # Some have fewer usable positions than embeddings, because they number them from 2.
    return EncoderProcessor(tokenizer, positions and min(positions, tokenizer.model_max_length))


def _unusable_end(folder: Path, tokenizer: PreTrainedTokenizerBase, rendered: str) -> str | None:
    """Return why answers cannot end with the tokenizer's eos_token, as they are trained to, or None.

    A template may end turns with another token, as those of Qwen2.5's base models do, which end texts with theirs. But
    a model that stops at the template's token gives that one at the end of an answer, and not its eos_token.

    Args:
        rendered: a conversation in the model's chat template, the last turn of which is `_SENTENCE`.
    """
    if (end := tokenizer.eos_token) is None:
        return "a tokenizer without an eos_token, with which answers end"
    closing = rendered.rpartition(_SENTENCE)[2]
    if closing.startswith(end):
        return None
    try:
        named = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        named = None
    ids = tokenizer(closing, add_special_tokens=False)["input_ids"][:1]
    if ids and ids[0] in (named if isinstance(named, list) else [named]):
        return f"a chat template that ends a turn as generation_config.json says, and not with the eos_token {end!r}"
    return None


def load_model(
    folder: Path,
    precision: str,
    device: str,
    double_quantization: bool = True,
    compute_dtype: str = "auto",
    classes: Sequence[str] = (),
) -> PreTrainedModel:
    """Load the folder's model on `device`, in eval mode.

    The architecture is the config's: any of transformers' image-text models, a text-only language model, or an encoder
    with a classification head. The folder's adapter, if it has one, is merged; over quantized weights it stays
    separate.

    Args:
        precision: "float32", "bfloat16" or "float16"; "int8" or "nf4" quantizes the language model alone on
            loading; "auto" is bfloat16 on CUDA (float16 on GPUs without it), float32 on the CPU, and the stored
            precision for a quantized folder.
        double_quantization: for "nf4", whether its scales are quantized too.
        compute_dtype: for "nf4", the dtype of its matrix products; "auto" is that of the other weights.
        classes: names of the classes, which an encoder needs: if it has no head for these (`has_head`), it gets a new
            one, with the same random weights every time.

    Raises:
        UserError: an encoder has no classes, or is to be quantized; the folder lacks files, a file is broken, weights
            are missing or of another shape, transformers does not know the architecture, or the folder is quantized by
            a method other than `precision`.
        RuntimeError: a layer outside the language model was quantized, or none was: a defect, not a user's mistake.
    """
    if not folder.is_dir():  # as in `load_processor`
        raise _load_error(folder, "no folder")
    if (stored := stored_method(folder)) and precision not in ("auto", stored):
        raise UserError(
            f"{folder}: expected weights that can be loaded as {precision}, found them quantized to {stored}; set the "
            "precision to auto, leave this method out, or take the model that it was quantized from"
        )
    quantizing = precision in METHODS and not stored
    config = _config(folder)
    head = _head(folder, config, classes, precision) if is_encoder(config.model_type) else {}
    try:
        dtype = _dtype(precision, device, config)
        # Not passed as None, which would undo the quantization that a quantized folder declares.
        quantization = {}
        if quantizing:
            computed = dtype if compute_dtype == "auto" else getattr(torch, compute_dtype)
            quantization["quantization_config"] = quantization_config(precision, computed, double_quantization)
        with _fresh_random() if head else nullcontext():
            model, info = auto_class(config.model_type).from_pretrained(
                folder,
                dtype=dtype,
                device_map=device,
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
        raise _load_error(folder, error) from None
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if head:
        missing = [name for name in missing if not in_head(name.lstrip("('"), model.base_model_prefix)]
    if missing:
        raise _load_error(folder, f"no fitting weight for {missing[0]} and {len(missing) - 1} more")
    if head:
        _renew_head(model)
    if quantizing:
        check_quantized(model)
    if device == "cpu":
        if quantizing or stored:
            keep_weights_as_stored(model)
        align_weights(model)
    attend_by_size(model)
    if (folder / ADAPTER).is_dir():
        model = _with_adapter(model, folder / ADAPTER, merge=not (quantizing or stored))
    return model.eval()


def has_head(folder: Path, classes: Sequence[str]) -> bool:
    """Return whether the encoder in `folder` has a classification head for these classes, in this order."""
    config = _config(folder)
    made_for = [name.endswith("ForSequenceClassification") for name in config.architectures or ()]
    return any(made_for) and [config.id2label[number] for number in sorted(config.id2label)] == list(classes)


def _config(folder: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever libraries raise over a damaged file
        raise _load_error(folder, error) from None


def _head(folder: Path, config: PretrainedConfig, classes: Sequence[str], precision: str) -> dict[str, Any]:
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


def _renew_head(model: PreTrainedModel) -> None:
    """Draw the weights of an encoder's head, which may be those of as many other classes, the same ones every time."""
    with _fresh_random():
        for name, module in model.named_children():
            if name != model.base_model_prefix:
                for parameter in module.parameters():
                    parameter._is_hf_initialized = False  # else transformers keeps what was loaded
                module.apply(model._init_weights)


@contextmanager
def _fresh_random() -> Iterator[None]:
    """Make the random numbers within the block the same every time, and those after it as if it had not been."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def stored_method(folder: Path) -> str | None:
    """Return the method by which the weights in `folder` are quantized: "int8", "nf4", "fp4", or None."""
    try:
        quantized = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None  # loading it reports what is wrong
    if not quantized:
        return None
    return "int8" if quantized.get("load_in_8bit") else quantized.get("bnb_4bit_quant_type", "fp4")


def language_model_prefix(model: PreTrainedModel) -> str:
    """Return the prefix, dot included, of the names of the language model's modules; vision modules lack it."""
    base = model.base_model_prefix
    return f"{base}.language_model." if hasattr(model.base_model, "language_model") else f"{base}."


def check_quantized(model: PreTrainedModel) -> dict[str, int]:
    """Count quantized and other linear layers, and check where they are: a misspelt module to skip fails silently.

    Raises:
        RuntimeError: a layer outside the language model was quantized, or none was.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt  # absent where nothing is quantized

    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantized = {name for name, module in linear.items() if isinstance(module, (Linear8bitLt, Linear4bit))}
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
        raise _load_error(folder, error) from None
    if missing := sorted(set(get_peft_model_state_dict(adapted)) - found):
        raise _load_error(folder, f"no weight for {missing[0]} and {len(missing) - 1} more")
    return adapted.merge_and_unload() if merge else adapted.get_base_model()


def _load_error(folder: Path | str, found: Any, remedy: str = RESTORE_REMEDY) -> UserError:
    first_line = " ".join(str(found).split())[:200]
    return UserError(f"{folder}: expected a complete Hugging Face model folder, found {first_line}; {remedy}")
