"""Make a Qwen2-VL model with random weights, its tokenizer and its processor, for runs without downloads.

The result has everything that a hub checkpoint of Qwen2-VL has: the model class, the fast Qwen2 tokenizer with its
special tokens, the image and video processors and a chat template of Qwen's structure. Only the sizes are small and the
weights random.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedModel,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from firstsight.core.errors import UserError
from firstsight.core.params import Initialisation

# In the order of their ids in Qwen2-VL, which follow the ids of all learned tokens.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def initialise(init: Initialisation, folder: Path) -> None:
    """Make the model and processor that `init` describes and save them in `folder`; a seed always gives the same
    weights.

    Raises:
        UserError: the corpus is missing, or the tokenizer has more tokens than the model has rows of embeddings.
    """
    tokenizer = fresh_tokenizer(init)
    torch.manual_seed(init.seed)
    build_model(init, tokenizer).save_pretrained(folder)
    build_processor(tokenizer, init.max_pixels).save_pretrained(folder)


def fresh_tokenizer(init: Initialisation) -> Qwen2Tokenizer:
    """Return the tokenizer that `init` describes. Raises UserError as `initialise` does."""
    try:
        corpus = Path(init.corpus).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"models: init.corpus: expected a text file to train the tokenizer on, found {error}; correct the path"
        ) from None
    tokenizer = train_tokenizer(corpus, init.vocabulary_size)
    if len(tokenizer) > init.embedding_rows:
        raise UserError(
            f"models: init.embedding_rows: expected at least {len(tokenizer)}, a row for every token, "
            f"found {init.embedding_rows}; raise it, or lower init.vocabulary_size"
        )
    return tokenizer


def train_tokenizer(corpus: list[str], vocabulary_size: int) -> Qwen2Tokenizer:
    """Train a byte-level BPE tokenizer with Qwen2's pre-tokenizer: `vocabulary_size` tokens at most, and special ones.

    All 256 bytes are tokens, so that every text can be encoded, whatever the corpus.
    """
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=vocabulary_size, initial_alphabet=alphabet, show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    vocab = learned["vocab"] | {token: len(learned["vocab"]) + n for n, token in enumerate(SPECIAL_TOKENS)}
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(pair) for pair in learned["merges"]],
        extra_special_tokens=list(SPECIAL_TOKENS),
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
    )


def build_processor(tokenizer: Qwen2Tokenizer, max_pixels: int) -> Qwen2VLProcessor:
    """Return Qwen2-VL's processor, which scales images, and frames of videos of up to 32, to at most `max_pixels`."""
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": max_pixels}
    video_size = size | {"longest_edge": 32 * max_pixels}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        video_processor=Qwen2VLVideoProcessor(size=video_size),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(init: Initialisation, tokenizer: Qwen2Tokenizer) -> PreTrainedModel:
    """Return a `Qwen2VLForConditionalGeneration` with random float32 weights from torch's global generator."""
    token = tokenizer.convert_tokens_to_ids
    half = init.hidden_size // init.heads // 2
    sections = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]  # Qwen2-VL's 16, 24, 24 in proportion
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": init.embedding_rows,
            "hidden_size": init.hidden_size,
            "intermediate_size": init.intermediate_size,
            "initializer_range": init.initializer_range,
            "num_hidden_layers": init.layers,
            "num_attention_heads": init.heads,
            "num_key_value_heads": init.kv_heads,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": init.tie_word_embeddings,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
        },
        vision_config={
            "depth": init.vision_layers,
            "embed_dim": init.vision_hidden_size,
            "num_heads": init.vision_heads,
            "hidden_size": init.hidden_size,
            "mlp_ratio": 4,
            "initializer_range": init.initializer_range,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=init.tie_word_embeddings,
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = token("<|im_end|>")
    model.generation_config.pad_token_id = token("<|endoftext|>")
    return model
