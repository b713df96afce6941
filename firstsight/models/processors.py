"""Load processors from Hugging Face folders: tokenizer, image and video processor, chat template."""

import json
from pathlib import Path

from transformers import AutoConfig, AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin

from firstsight.models.architecture import is_encoder
from firstsight.models.model_folder import RESTORE_REMEDY, folder_error
from firstsight.models.text_processor import EncoderProcessor, TextProcessor

_SENTENCE = "What is in the cup?"


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
        raise folder_error(place, "no folder", remedy)
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
        raise folder_error(place, error, remedy) from None
    # A tokenizer without its vocabulary still loads, and encodes to nothing.
    if read_back != _SENTENCE:
        raise folder_error(place, f"a tokenizer that reads {_SENTENCE!r} as {read_back!r}", remedy)
    if found := _unusable_end(folder, processor.tokenizer, rendered):
        raise folder_error(place, found, remedy)
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
