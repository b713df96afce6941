r"""A tiny random EgoGPT checkpoint in the layout of the authors' own, and the media that it was shown.

tests/data/egogpt.safetensors holds what the authors' code (github.com/EvolvingLMMs-Lab/EgoLife, folder EgoGPT, commit
7a97157) makes of it, run once outside this repository in float32 on a CPU, under torch 2.15.0 and transformers 4.45.2:
of each of `CASES`, the hidden states [S, H] after the last norm at the `kept` of the S positions, the logits [V] of the
last, and S. All weights were loaded by name, strictly; the prompt is that of their inference.py, with `<image>\n` for
each of several images; a video went through their SigLIP processor, an image through their anyres tiling, and several
images through their padding, as in their training. Nothing here is of their code, and none of it depends on a random
generator of torch.

What is true of the real checkpoint and cannot be small: 384-pixel pictures of 27 x 27 patches, 30 s of silence,
72 values an attention head of SigLIP and 64 of Whisper, 2,048 hidden values of the speech projector.
"""

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, LAYERS, HEADS, KV_HEADS, MLP = 64, 2, 4, 2, 96
VISION, VISION_LAYERS, VISION_MLP = 144, 2, 96
SPEECH, SPEECH_LAYERS, MELS = 128, 2, 128
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Newlines merge, so that "\n" and "\n\n" tokenized apart are not what "\n\n\n" is.
MERGES = (("\u010a", "\u010a"), ("\u010a\u010a", "\u010a"))
VOCABULARY_ROWS = 272
QUESTION = "What is in my left hand?"
SQUARE = (384, 384)
# Of each case: how its pictures are given, their heights and widths, and where the newlines of a video stand.
CASES = {
    "image-of-two-tiles": ("image", [(384, 768)], "grid"),
    "image-with-borders": ("image", [(320, 768)], "grid"),
    "three-images": ("image", [SQUARE] * 3, "grid"),
    "one-frame-grid": ("video", [SQUARE], "grid"),
    "sixteen-frames-grid": ("video", [SQUARE] * 16, "grid"),
    "one-frame-one-token": ("video", [SQUARE], "one_token"),
    "sixteen-frames-one-token": ("video", [SQUARE] * 16, "one_token"),
}


def config(newline_position: str) -> dict:
    """config.json as the authors' training script leaves it."""
    return {
        "architectures": ["EgoGPTQwenForCausalLM"],
        "model_type": "egogpt_qwen",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY_ROWS,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "bos_token_id": 256 + len(MERGES),
        "eos_token_id": 256 + len(MERGES) + 2,
        "torch_dtype": "float32",
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [[384 * width, 384 * height] for width in range(1, 7) for height in range(1, 7)],
        "mm_hidden_size": VISION,
        "mm_newline_position": newline_position,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "add_faster_video": False,
        "speech_encoder": "large-v3.pt",
        "speech_encoder_type": "whisper",
        "speech_encoder_ds_rate": 5,
        "speech_encoder_hidden_size": SPEECH,
        "speech_projector_type": "linear",
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 32768,
    }


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight, in the names of the authors' modules."""
    yield "model.embed_tokens.weight", (VOCABULARY_ROWS, HIDDEN)
    for layer in range(LAYERS):
        prefix, kv = f"model.layers.{layer}", HIDDEN // HEADS * KV_HEADS
        for name, width in (("q_proj", HIDDEN), ("k_proj", kv), ("v_proj", kv)):
            yield from linear(f"{prefix}.self_attn.{name}", width, HIDDEN)
        yield f"{prefix}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield f"{prefix}.mlp.gate_proj.weight", (MLP, HIDDEN)
        yield f"{prefix}.mlp.up_proj.weight", (MLP, HIDDEN)
        yield f"{prefix}.mlp.down_proj.weight", (HIDDEN, MLP)
        yield f"{prefix}.input_layernorm.weight", (HIDDEN,)
        yield f"{prefix}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY_ROWS, HIDDEN)
    yield "model.image_newline", (HIDDEN,)
    yield from linear("model.mm_projector.0", HIDDEN, VISION)
    yield from linear("model.mm_projector.2", HIDDEN, HIDDEN)
    tower = "model.vision_tower.vision_tower.vision_model"
    yield f"{tower}.embeddings.patch_embedding.weight", (VISION, 3, 14, 14)
    yield f"{tower}.embeddings.patch_embedding.bias", (VISION,)
    yield f"{tower}.embeddings.position_embedding.weight", (27 * 27, VISION)
    for layer in range(VISION_LAYERS):
        prefix = f"{tower}.encoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from linear(f"{prefix}.self_attn.{name}", VISION, VISION)
        yield from linear(f"{prefix}.mlp.fc1", VISION_MLP, VISION)
        yield from linear(f"{prefix}.mlp.fc2", VISION, VISION_MLP)
        yield from norm(f"{prefix}.layer_norm1", VISION)
        yield from norm(f"{prefix}.layer_norm2", VISION)
    yield from norm(f"{tower}.post_layernorm", VISION)
    encoder = "model.speech_encoder.encoder"
    yield f"{encoder}.positional_embedding", (1500, SPEECH)
    yield f"{encoder}.conv1.weight", (SPEECH, MELS, 3)
    yield f"{encoder}.conv1.bias", (SPEECH,)
    yield f"{encoder}.conv2.weight", (SPEECH, SPEECH, 3)
    yield f"{encoder}.conv2.bias", (SPEECH,)
    for layer in range(SPEECH_LAYERS):
        prefix = f"{encoder}.blocks.{layer}"
        for name in ("query", "value", "out"):
            yield from linear(f"{prefix}.attn.{name}", SPEECH, SPEECH)
        yield f"{prefix}.attn.key.weight", (SPEECH, SPEECH)
        yield from norm(f"{prefix}.attn_ln", SPEECH)
        yield from linear(f"{prefix}.mlp.0", 4 * SPEECH, SPEECH)
        yield from linear(f"{prefix}.mlp.2", SPEECH, 4 * SPEECH)
        yield from norm(f"{prefix}.mlp_ln", SPEECH)
    yield from norm(f"{encoder}.ln_post", SPEECH)
    yield from linear("model.speech_projector.linear1", 2048, 5 * SPEECH)
    yield from linear("model.speech_projector.linear2", HIDDEN, 2048)


def linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Uniform values drawn from the name: norms about 1, matrices of a variance that keeps activations of size 1."""
    values = torch.frombuffer(bytearray(random.Random(name).randbytes(math.prod(shape))), dtype=torch.uint8)
    uniform = (values.reshape(shape).float() - 127.5) / 127.5
    if len(shape) == 1:
        return uniform / 4 + (1 if "norm" in name or "ln" in name.split(".")[-2] else 0)
    embedding = "embed" in name and "patch" not in name
    return uniform if embedding else uniform * math.sqrt(3 / math.prod(shape[1:]))


def save_original(folder: Path, newline_position: str = "grid") -> None:
    """Write the checkpoint as the hub has it: config, tokenizer, and weights in two shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(newline_position)))
    save_tokenizer(folder)
    weights = {name: weight(name, shape) for name, shape in shapes()}
    names = list(weights)
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def save_tokenizer(folder: Path) -> None:
    """Qwen2's byte-level tokenizer, with two merges, in the files that a checkpoint of its time has."""
    # Byte-level BPE writes printable bytes as themselves and the others as characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [*map(chr, printable), *(chr(256 + number) for number in range(len(others)))]
    tokens = [*letters, *("".join(pair) for pair in MERGES)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))
    added = {
        str(len(tokens) + number): {"content": token, "special": True, "lstrip": False, "rstrip": False}
        | {"normalized": False, "single_word": False}
        for number, token in enumerate(SPECIAL_TOKENS)
    }
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "errors": "replace",
        "model_max_length": 32768,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def pictures(case: str) -> list[Tensor]:
    """The pictures of a case, uint8 [height, width, 3]: coloured noise in squares of 16 pixels.

    Libraries round differently when they resize. A height that is not a tile's has to be, so that picture is of
    stripes from top to bottom; a tile's height stays, and halving the width of squares has one result.
    """
    return [_picture(f"{number}", *size) for number, size in enumerate(CASES[case][1])]


def _picture(name: str, height: int, width: int) -> Tensor:
    rows, columns = height // 16 if height % 384 == 0 else 1, width // 16
    noise = bytearray(random.Random(f"picture {name}").randbytes(3 * rows * columns))
    squares = torch.frombuffer(noise, dtype=torch.uint8).reshape(rows, columns, 3)
    return squares.repeat_interleave(height // rows, dim=0).repeat_interleave(16, dim=1)


def kept(length: int) -> list[int]:
    """The positions whose hidden states the fixture has."""
    return sorted({*range(0, length, 24), *range(max(0, length - 8), length)})
