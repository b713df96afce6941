"""Checkpoints of several families, tiny and random, in the hub's own layout."""

import json
from pathlib import Path

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from firstsight.acquisition.initialise import CHAT_TEMPLATE as QWEN2_VL_TEMPLATE
from firstsight.acquisition.initialise import build_model

# As llava-hf's checkpoints have it: no system prompt, media before text, and past turns that do not render as prompts.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
SIDE, PATCH = 28, 14
PINPOINTS = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


def tokenizer_like(student: Qwen2Tokenizer, special: tuple[str, ...] = SPECIAL_TOKENS) -> Qwen2Tokenizer:
    """The student's words under the same ids, and special tokens of another family after them."""
    text = {t: i for t, i in student.get_vocab().items() if i not in student.added_tokens_decoder}
    learned = json.loads(student.backend_tokenizer.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=text | {token: len(text) + number for number, token in enumerate(special)},
        merges=[tuple(pair) for pair in learned["merges"]],
        extra_special_tokens=list(special),
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
    )


def save_llava(folder: Path, tokenizer: Qwen2Tokenizer) -> None:
    """A LLaVA-OneVision checkpoint: SigLIP, projector, Qwen2, anyres images of up to four patches, pooled videos."""
    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer) + 11,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.08,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
    )
    LlavaOnevisionForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        tokenizer=tokenizer,
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.08,
}
# Qwen2's template knows content as text alone.
TEXT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role + '\n' + message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_qwen2_vl(folder: Path, settings, processor) -> None:
    torch.manual_seed(0)
    build_model(settings.models.teacher.init, processor.tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)


def save_qwen2_5_vl(folder: Path, settings, processor) -> None:
    token = processor.tokenizer.convert_tokens_to_ids
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=TEXT
        | {
            "vocab_size": 704,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2_5_VLProcessor(
        image_processor=processor.image_processor,
        video_processor=processor.video_processor,
        tokenizer=processor.tokenizer,
        chat_template=QWEN2_VL_TEMPLATE,
    ).save_pretrained(folder)


def save_qwen2(folder: Path, settings, processor) -> None:
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**TEXT, vocab_size=704)).save_pretrained(folder)
    tokenizer = tokenizer_like(processor.tokenizer)
    tokenizer.chat_template = TEXT_TEMPLATE
    tokenizer.save_pretrained(folder)


def save_llava_onevision(folder: Path, settings, processor) -> None:
    save_llava(folder, tokenizer_like(processor.tokenizer))


SAVE = {
    "Qwen2VLForConditionalGeneration": save_qwen2_vl,
    "Qwen2_5_VLForConditionalGeneration": save_qwen2_5_vl,
    "LlavaOnevisionForConditionalGeneration": save_llava_onevision,
    "Qwen2ForCausalLM": save_qwen2,
}
