"""Loading models and processors from Hugging Face folders: the one place that decides device and precision."""

import json
import logging
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
    BatchEncoding,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from firstsight.core.cores import cores
from firstsight.core.errors import UserError
from firstsight.core.stage import log
from firstsight.models.architecture import auto_class

# It says at every layer that inputs are cast to float16, which is what LLM.int8 does.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# The vision tower loses most from 8 and 4 bits and holds least of the weights. Whole names, because "visual" alone
# would not match the tower's blocks; and with the head's, because naming any module drops the default that skips it.
KEPT_IN_HIGH_PRECISION = ["model.visual", "model.vision_tower", "model.multi_modal_projector", "lm_head"]
# The folder of an adapter that belongs to the model it lies in.
ADAPTER = "adapter"

# Bytes: a cache line, and what torch itself allocates at.
_ALIGNMENT = 64

MAKE_AGAIN = "make it again (dvc repro) or restore it (dvc checkout)"

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
        torch.set_num_threads(max(1, cores() // state.num_processes))
        log.info("running on the CPU, %d threads", torch.get_num_threads())
    return device


class TextProcessor:
    """A tokenizer as the processor of a text-only model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.batch_decode, self.save_pretrained = tokenizer.batch_decode, tokenizer.save_pretrained

    def __call__(self, text: list[str], **options: Any) -> BatchEncoding:
        return self.tokenizer(text, **options)

    def apply_chat_template(self, conversations: list, **options: Any) -> Any:
        """As the tokenizer's, with contents joined to text, which is what text-only templates expect.

        Raises:
            UserError: a content has media.
        """
        single = isinstance(conversations[0], dict)
        plain = [
            [turn | {"content": self._text(turn["content"])} for turn in conversation]
            for conversation in ([conversations] if single else conversations)
        ]
        return self.tokenizer.apply_chat_template(plain[0] if single else plain, **options)

    def _text(self, content: list[dict[str, str]]) -> str:
        if media := [part["type"] for part in content if part["type"] != "text"]:
            raise UserError(
                f"{self.tokenizer.name_or_path}: expected records without media, because this model reads text alone, "
                f"found {media}; take a vision-language model, or data without media"
            )
        return "".join(part["text"] for part in content)


def load_processor(folder: Path, place: str = "", remedy: str = MAKE_AGAIN) -> ProcessorMixin | TextProcessor:
    """The folder's processor: tokenizer, image and video processor, chat template.

    Raises UserError, which calls the folder `place` (its path if empty) and ends with `remedy`, when it cannot be used.
    """
    place = place or str(folder)
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if isinstance(processor, PreTrainedTokenizerBase):
            processor = TextProcessor(processor)
        read_back = processor.tokenizer.decode(processor.tokenizer(_SENTENCE)["input_ids"], skip_special_tokens=True)
        turns = [{"role": role, "content": [{"type": "text", "text": _SENTENCE}]} for role in ("user", "assistant")]
        rendered = processor.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # whatever libraries raise over a damaged file
        raise _broken(place, error, remedy) from None
    # Without its vocabulary a tokenizer still loads, and reads nothing.
    if read_back != _SENTENCE:
        raise _broken(place, f"a tokenizer that reads {_SENTENCE!r} as {read_back!r}", remedy)
    # An answer is taught as its text and this token; another would never end it.
    end = processor.tokenizer.eos_token
    if f"{_SENTENCE}{end}" not in rendered:
        found = f"a chat template that does not end a turn with the eos_token {end!r}: {rendered!r}"
        raise _broken(place, found, remedy)
    videos = getattr(processor, "video_processor", None)
    if getattr(videos, "cap_pixels_per_frame", False) is None:
        # Frames have their size since the data set was built; left open, transformers warns in every process.
        videos.cap_pixels_per_frame = False
    return processor


def load_model(
    folder: Path,
    precision: str,
    device: str,
    double_quantization: bool = True,
    compute_dtype: str = "auto",
) -> PreTrainedModel:
    """The folder's model, on `device`, in eval mode; its adapter, if there is one, merged, or over quantised weights.

    The architecture is what its config says: any of transformers' image-text models, or a text-only language model.

    Args:
        precision: "float32", "bfloat16" or "float16"; "int8" or "nf4" quantises the language model on loading, and
            nothing else; "auto" is bfloat16 on CUDA and float32 on the CPU, and of a quantised folder all is
            as it is stored.
        double_quantization: of "nf4": its scales are quantised too.
        compute_dtype: of "nf4": what its products are computed in; "auto" is what the other weights are in.

    Raises:
        UserError: the folder lacks files, a file is broken, weights are missing or of another shape, transformers
            does not know the architecture, or the folder is quantised and `precision` says otherwise.
        RuntimeError: a layer that should keep its precision was quantised, or none was; never expected.
    """
    if (stored := stored_method(folder)) and precision not in ("auto", stored):
        raise UserError(
            f"{folder}: expected weights that can be loaded as {precision}, found them quantised to {stored}; set the "
            "precision to auto, leave this method out, or take the model that it was quantised from"
        )
    quantising = precision in ("int8", "nf4") and not stored
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        dtype = _dtype(precision, device, config)
        # Left out where there is none: None would undo the quantisation that a quantised folder declares.
        quantization = {}
        if quantising:
            computed = dtype if compute_dtype == "auto" else getattr(torch, compute_dtype)
            quantization["quantization_config"] = quantization_config(precision, computed, double_quantization)
        model, info = auto_class(config.model_type).from_pretrained(
            folder,
            dtype=dtype,
            device_map=device,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,  # not even asked about
            **quantization,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever libraries raise over a damaged file
        raise _broken(folder, error) from None
    if absent := sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"]):
        raise _broken(folder, f"no fitting weight for {absent[0]} and {len(absent) - 1} more")
    if quantising:
        check_quantised(model)
    if device == "cpu":
        if quantising or stored:
            keep_weights_as_stored(model)
        align_weights(model)
    if (folder / ADAPTER).is_dir():
        model = _with_adapter(model, folder / ADAPTER, merge=not (quantising or stored))
    return model.eval()


def stored_method(folder: Path) -> str | None:
    """How bitsandbytes quantised the weights stored in `folder`: "int8", "nf4" or "fp4"; None if it did not."""
    try:
        quantised = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None  # what is wrong with it is said when it is loaded
    if not quantised:
        return None
    return "int8" if quantised.get("load_in_8bit") else quantised.get("bnb_4bit_quant_type", "fp4")


def language_model_name(model: PreTrainedModel) -> str:
    """The name, with a dot after it, under which a model has its language model; what is beside it sees."""
    return "model.language_model." if hasattr(model.model, "language_model") else "model."


def check_quantised(model: PreTrainedModel) -> dict[str, int]:
    """Number of quantised and of other linear layers. Names of modules to skip fail silently, so types are asserted.

    Raises:
        RuntimeError: a layer outside the language model was quantised, or none was.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt  # absent where nothing is quantised

    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantised = {name for name, module in linear.items() if isinstance(module, (Linear8bitLt, Linear4bit))}
    wrong = [name for name in quantised if not name.startswith(language_model_name(model))]
    if wrong or not quantised:
        raise RuntimeError(
            f"expected quantised layers in the language model only, found {len(quantised)}, and {wrong[:3]} outside it"
        )
    return {"quantized_layers": len(quantised), "kept_layers": len(linear) - len(quantised)}


def keep_weights_as_stored(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking the 4-bit weights of a model on the CPU.

    On a processor with AVX-512-BF16, `Linear4bit` of bitsandbytes 0.50.2 replaces its weights at the first forward pass
    in eval mode: scales become bfloat16, and products are computed in bfloat16, whatever `compute_dtype` says. That
    raises unless a layer has a multiple of 32 rows and of 64 columns; saving afterwards stores the rounded scales;
    training afterwards gets no gradient through the layer. Without it, every processor computes from the weights as
    stored, in the precision that was asked for, and figures of one machine hold on another. To be removed when the
    library computes layers of every shape in `compute_dtype` (`_convert_weight_packed_for_cpu` in its functional.py).
    """
    from bitsandbytes.nn import Linear4bit  # absent where nothing is quantised

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
    """Move float weights and buffers on the CPU to addresses that are multiples of 64 bytes, where they are not.

    In a safetensors file, weights lie wherever its header ends, and are used there. Matrix products of MKL may round
    differently by address (Intel's notes on conditional numerical reproducibility ask for 64 bytes), and LLM.int8 turns
    such a difference of 1e-6 into one of 1e-2 where an activation then rounds to another of its 255 levels: a model and
    its saved copy would answer differently.
    """
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point() and tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()


def quantization_config(method: str, compute_dtype: torch.dtype, double: bool = True) -> BitsAndBytesConfig:
    """bitsandbytes settings for "int8" (LLM.int8) or "nf4" (by default with double quantisation)."""
    if method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=KEPT_IN_HIGH_PRECISION)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=KEPT_IN_HIGH_PRECISION,
    )


def _dtype(precision: str, device: str, config: PretrainedConfig) -> torch.dtype:
    """The precision of the weights that are not quantised; on a CPU, beside quantised ones, that of the checkpoint."""
    if precision in ("float32", "bfloat16", "float16"):
        return getattr(torch, precision)
    if device == "cuda":
        return torch.bfloat16
    quantised = precision in ("int8", "nf4") or hasattr(config, "quantization_config")
    return (config.dtype or torch.float32) if quantised else torch.float32


def _with_adapter(model: PreTrainedModel, folder: Path, merge: bool) -> PreTrainedModel:
    from peft import PeftModel, get_peft_model_state_dict  # seconds to import, for the few models that have one

    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:  # peft would take a pickle
            found = set(file.keys())
        adapted = PeftModel.from_pretrained(model, folder)
    except Exception as error:  # whatever libraries raise over a damaged file
        raise _broken(folder, error) from None
    if absent := sorted(set(get_peft_model_state_dict(adapted)) - found):
        raise _broken(folder, f"no weight for {absent[0]} and {len(absent) - 1} more")
    return adapted.merge_and_unload() if merge else adapted.get_base_model()


def _broken(folder: Path | str, found: Any, remedy: str = MAKE_AGAIN) -> UserError:
    first_line = " ".join(str(found).split())[:200]
    return UserError(f"{folder}: expected a complete Hugging Face model folder, found {first_line}; {remedy}")
