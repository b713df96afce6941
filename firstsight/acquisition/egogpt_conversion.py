"""Convert an EgoGPT checkpoint in its authors' layout (`model_type: egogpt_qwen`) to a folder that transformers reads.

`convert` does this in order:
1. `check_texts`: check the settings in config.json, read the tokenizer, and add the tokens that mark media to it.
2. `_headers`: read the names, shapes and dtypes of the weights, not yet their values, and rename them (`RENAMES`).
3. `_processor`, `_config`: derive the processor and the config from the settings and the shapes of the weights.
4. `_check`: build the model on the meta device, and compare its weights' names and shapes with the checkpoint's.
5. `_write_weights`: copy the weights under their new names, one shard at a time. Whisper's encoder and the speech
   projector are not copied: FirstSight has no audio, so they are run once, on 30 s of silence, and the features that
   they return are stored as a weight instead (see `firstsight.models.egogpt`).
6. Save the processor, the config and the generation settings, and copy the model card and the licence.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, Qwen2Tokenizer, WhisperConfig

from firstsight.core.errors import UserError
from firstsight.core.files import write_json
from firstsight.models.egogpt import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN,
    SPEECH_TOKEN,
    VIDEO_TOKEN,
    EgoGptConfig,
    EgoGptForConditionalGeneration,
    EgoGptProcessor,
)

# config.json names SigLIP so400m and Whisper large-v3 without their shapes. The weights determine all but these.
IMAGE_SIDE = 384
VISION_HEAD_DIM, SPEECH_HEAD_DIM = 72, 64
MEL_FRAMES = 3000  # 30 s

# Settings of the language model that are whole numbers, the frames per speech feature, and all settings of the model.
COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
RATE = "speech_encoder_ds_rate"
TEXT_FIELDS = (*COUNTS, "rms_norm_eps", "hidden_act")
# Dtypes as safetensors files name them, and as torch does.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# Regular expressions for the authors' names of weights, and our names. `speech.*` is not part of the converted model.
RENAMES = (
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    (r"^model\.speech_projector\.", "speech.projector."),
    (r"^model\.speech_encoder\.encoder\.", "speech.encoder."),
    (r"^speech\.encoder\.positional_embedding$", "speech.encoder.embed_positions.weight"),
    (r"^speech\.encoder\.ln_post\.", "speech.encoder.layer_norm."),
    (r"^speech\.encoder\.blocks\.", "speech.encoder.layers."),
    (r"\.attn\.query\.", ".self_attn.q_proj."),
    (r"\.attn\.key\.", ".self_attn.k_proj."),
    (r"\.attn\.value\.", ".self_attn.v_proj."),
    (r"\.attn\.out\.", ".self_attn.out_proj."),
    (r"\.attn_ln\.", ".self_attn_layer_norm."),
    (r"\.mlp\.0\.", ".fc1."),
    (r"\.mlp\.2\.", ".fc2."),
    (r"\.mlp_ln\.", ".final_layer_norm."),
)

Shapes = dict[str, tuple[int, ...]]


class Speech(nn.Module):
    """Hold Whisper's encoder and EgoGPT's projector, which maps every `rate` states to one speech feature of size H."""

    def __init__(self, encoder: WhisperConfig, rate: int, width: int, hidden_size: int):
        # Imported here, as in `_processor`, because few checkpoints are EgoGPT's.
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        super().__init__()
        self.encoder = WhisperEncoder(encoder)
        self.projector = nn.ModuleDict(
            {
                "linear1": nn.Linear(rate * encoder.d_model, width),
                "linear2": nn.Linear(width, hidden_size),
            }
        )
        self.rate = rate

    def silence(self) -> Tensor:
        """Return the features [n, H] of 30 seconds of silence, which is a spectrogram of zeros in the authors' code."""
        states = self.encoder(torch.zeros(1, self.encoder.config.num_mel_bins, MEL_FRAMES)).last_hidden_state[0]
        joined = states[: len(states) // self.rate * self.rate].reshape(-1, self.rate * states.shape[1])
        return self.projector["linear2"](self.projector["linear1"](joined).relu())


def is_original(config_path: Path) -> bool:
    """Return whether `config_path` is the config.json of an EgoGPT checkpoint in its authors' layout."""
    try:
        return json.loads(config_path.read_text(encoding="utf-8")).get("model_type") == "egogpt_qwen"
    except (OSError, ValueError, AttributeError):
        return False


def convert(source: Path, folder: Path, name: str = "") -> None:
    """Convert the checkpoint in `source` into the empty `folder`.

    Memory holds one shard at a time, and the speech modules in float32 (2.6 GB in the 7B model).

    Args:
        name: what errors call the checkpoint; the path of `source` if empty.

    Raises:
        UserError: the layout is not EgoGPT's, a weight is missing, unexpected or of another shape, a file is missing or
            broken, or the embedding has no rows for the three tokens that mark media.
    """
    name = name or str(source)
    settings, tokenizer = check_texts(source, name)
    files, shapes, dtype = _headers(source, name)
    processor = _processor(tokenizer, settings, shapes, name)
    config = _config(settings, shapes, processor, dtype, name)
    with torch.device("meta"):
        model, speech = EgoGptForConditionalGeneration(config), _speech(settings, config, shapes, name)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items() if key != "model.silence"}
    expected |= {f"speech.{key}": tuple(value.shape) for key, value in speech.state_dict().items()}
    _check(expected, shapes, name)
    _write_weights(files, folder, speech)
    processor.save_pretrained(folder)
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=settings.get("bos_token_id"),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    for path in (*source.glob("README.md"), *source.glob("LICENSE*")):
        shutil.copyfile(path, folder / path.name)


def converted_config(source: Path, name: str) -> EgoGptConfig:
    """Return the config that converting the checkpoint in `source` would write. Raises UserError as `convert` does."""
    settings, tokenizer = check_texts(source, name)
    _, shapes, dtype = _headers(source, name)
    return _config(settings, shapes, _processor(tokenizer, settings, shapes, name), dtype, name)


def check_texts(source: Path, name: str) -> tuple[dict[str, Any], Qwen2Tokenizer]:
    """Return the checked settings of config.json, and the tokenizer with the tokens that mark media.

    Raises:
        UserError: a setting is missing, invalid or of an unknown layout, or the tokenizer cannot be read.
    """
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if absent := [key for key in (*TEXT_FIELDS, "rope_theta", RATE) if key not in settings]:
        raise UserError(f"{name}: config.json: expected {absent[0]}, found none; download the checkpoint again")

    def check(key: str, expected: str, holds: bool) -> None:
        if not holds:
            raise UserError(
                f"{name}: config.json: {key}: expected {expected}, found {settings[key]!r}; "
                "download the checkpoint again"
            )

    for key in (*COUNTS, RATE):
        check(key, "a whole number above 0", type(settings[key]) is int and settings[key] > 0)
    for key in ("rms_norm_eps", "rope_theta"):
        check(key, "a number above 0", type(settings[key]) in (int, float) and settings[key] > 0)
    check("hidden_act", "the name of an activation", isinstance(settings["hidden_act"], str))
    heads = settings["num_attention_heads"]
    check("hidden_size", f"a multiple of {heads} heads", settings["hidden_size"] % (2 * heads) == 0)
    check("num_key_value_heads", f"a divisor of {heads} heads", heads % settings["num_key_value_heads"] == 0)
    for key, default, known in (
        ("rope_scaling", None, (None,)),
        ("use_sliding_window", False, (False,)),
        ("mm_patch_merge_type", "flat", ("spatial_unpad",)),
        ("add_faster_video", False, (False,)),
    ):
        _setting(settings, key, default, known, name)
    _pinpoints(settings, name)
    try:
        return settings, _tokenizer(source)
    except Exception as error:  # libraries raise many kinds of error over a damaged file
        raise _broken(name, error) from None


def _headers(source: Path, name: str) -> tuple[list[Path], Shapes, str]:
    """Return the files of weights, the shapes of the weights by our names, and the dtype of the embedding."""
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise UserError(f"{name}: expected weights in *.safetensors, found none; name a complete EgoGPT checkpoint")
    try:
        stored = {key: (shape, dtype) for key, shape, dtype in _stored(files)}
    except Exception as error:  # libraries raise many kinds of error over a damaged file
        raise _broken(name, error) from None
    shapes = {key: shape for key, (shape, _) in stored.items()}
    embedding = "model.language_model.embed_tokens.weight"
    _shape(shapes, embedding, name)
    dtype = stored[embedding][1]
    if dtype not in DTYPES:
        raise UserError(
            f"{name}: expected weights in {', '.join(DTYPES)}, found {dtype}; name the checkpoint that it was made from"
        )
    return files, shapes, DTYPES[dtype]


def _broken(name: str, error: Exception) -> UserError:
    """Return the error for a file that a library cannot read."""
    return UserError(
        f"{name}: expected a complete EgoGPT checkpoint, found a broken file ({' '.join(str(error).split())}); "
        "download it again"
    )


def _rename(name: str) -> str:
    """Return our name of a weight, from the authors' name."""
    for pattern, ours in RENAMES:
        name = re.sub(pattern, ours, name)
    return name


def _stored(files: list[Path]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield our name, the shape and the dtype of every weight, from the headers of the files."""
    for path in files:
        with safe_open(path, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118, safe_open is not a mapping
                part = weights.get_slice(key)
                yield _rename(key), tuple(part.get_shape()), part.get_dtype()


def _shape(shapes: Shapes, weight: str, name: str) -> tuple[int, ...]:
    """Return the shape of a weight. Raise UserError if it is missing."""
    if weight not in shapes:
        raise UserError(f"{name}: expected a weight for {weight}, found none; download the checkpoint again")
    return shapes[weight]


def _layers(shapes: Shapes, prefix: str) -> int:
    """Return the number of layers, whose weights are named `prefix`.N."""
    return len({key.removeprefix(f"{prefix}.").split(".")[0] for key in shapes if key.startswith(f"{prefix}.")})


def _setting(settings: dict[str, Any], key: str, default: Any, known: tuple[Any, ...], name: str) -> Any:
    """Return the setting `key`, or the authors' default. Raise UserError if it is not one of the `known` values."""
    if (value := settings.get(key, default)) not in known:
        raise UserError(
            f"{name}: config.json: {key}: expected {' or '.join(map(repr, known))}, found {value!r}; "
            "only checkpoints in EgoGPT's own layout can be converted"
        )
    return value


def _pinpoints(settings: dict[str, Any], name: str) -> list[list[int]]:
    """Return the resolutions of the anyres grid as [height, width] in pixels.

    config.json has [width, height] pairs, or a range of tiles such as "(1x1),...,(6x6)". Their order matters: of
    resolutions that fit equally well, the first is used.
    """
    given = settings.get("image_grid_pinpoints")
    if isinstance(given, str) and (ends := re.findall(r"\((\d+)x(\d+)\)", given)):
        (left, top), (right, bottom) = (map(int, ends[index]) for index in (0, -1))
        given = [
            [IMAGE_SIDE * width, IMAGE_SIDE * height]
            for width in range(left, right + 1)
            for height in range(top, bottom + 1)
        ]
    pairs = isinstance(given, list) and all(isinstance(one, list) and len(one) == 2 for one in given)
    if not (pairs and given and all(type(side) is int and side > 0 for one in given for side in one)):
        raise UserError(
            f"{name}: config.json: image_grid_pinpoints: expected a list of resolutions or a range of tiles, "
            f"found {given!r}; only checkpoints in EgoGPT's own layout can be converted"
        )
    return [[height, width] for width, height in given]


def _processor(tokenizer: Qwen2Tokenizer, settings: dict[str, Any], shapes: Shapes, name: str) -> EgoGptProcessor:
    """Return the processor: SigLIP's normalisation and size, and the layout of the settings."""
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionVideoProcessor

    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": IMAGE_SIDE, "width": IMAGE_SIDE}}
    return EgoGptProcessor(
        image_processor=LlavaOnevisionImageProcessor(image_grid_pinpoints=_pinpoints(settings, name), **half),
        video_processor=LlavaOnevisionVideoProcessor(**half),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
        num_image_tokens=_shape(shapes, "model.vision_tower.embeddings.position_embedding.weight", name)[0],
        num_speech_tokens=_speech_tokens(settings, shapes, name),
        newline_position=_setting(settings, "mm_newline_position", "one_token", ("grid", "one_token"), name),
        vision_aspect_ratio=_setting(settings, "image_aspect_ratio", "square", ("anyres_max_9",), name),
    )


def _speech_tokens(settings: dict[str, Any], shapes: Shapes, name: str) -> int:
    """Return the number of speech features of 30 seconds."""
    return _shape(shapes, "speech.encoder.embed_positions.weight", name)[0] // settings[RATE]


def _tokenizer(source: Path) -> Qwen2Tokenizer:
    """Return the checkpoint's tokenizer, with the three tokens that mark media added after its own."""
    tokenizer = Qwen2Tokenizer.from_pretrained(source, local_files_only=True)
    tokenizer.add_tokens([IMAGE_TOKEN, VIDEO_TOKEN, SPEECH_TOKEN], special_tokens=True)
    return tokenizer


def _config(
    settings: dict[str, Any], shapes: Shapes, processor: EgoGptProcessor, dtype: str, name: str
) -> EgoGptConfig:
    """Return the config: the language model's settings, and the vision tower's from the shapes of its weights."""
    tokens = processor.tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, VIDEO_TOKEN, SPEECH_TOKEN])
    if max(tokens) >= settings["vocab_size"]:
        raise UserError(
            f"{name}: expected at least {max(tokens) + 1} rows of embeddings, three of them for the tokens that mark "
            f"media, found {settings['vocab_size']}; only checkpoints in EgoGPT's own layout can be converted"
        )
    hidden, _, patch, _ = _shape(shapes, "model.vision_tower.embeddings.patch_embedding.weight", name)
    return EgoGptConfig(
        text_config={
            "model_type": "qwen2",
            "rope_parameters": {"rope_type": "default", "rope_theta": settings["rope_theta"]},
            "eos_token_id": processor.tokenizer.eos_token_id,
            "pad_token_id": processor.tokenizer.pad_token_id,
            **{field: settings[field] for field in TEXT_FIELDS},
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": hidden,
            "intermediate_size": _shape(shapes, "model.vision_tower.encoder.layers.0.mlp.fc1.weight", name)[0],
            "num_hidden_layers": _layers(shapes, "model.vision_tower.encoder.layers"),
            "num_attention_heads": hidden // VISION_HEAD_DIM,
            "image_size": IMAGE_SIDE,
            "patch_size": patch,
            "vision_use_head": False,
        },
        image_token_index=tokens[0],
        video_token_index=tokens[1],
        speech_token_index=tokens[2],
        speech_tokens=processor.num_speech_tokens,
        newline_position=processor.newline_position,
        image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
        vision_aspect_ratio=processor.vision_aspect_ratio,
        architectures=[EgoGptForConditionalGeneration.__name__],
        dtype=dtype,
    )


def _check(expected: Shapes, shapes: Shapes, name: str) -> None:
    """Raise UserError unless the weights have exactly the names and shapes of the model's."""
    if missing := sorted(expected.keys() - shapes.keys()):
        raise UserError(
            f"{name}: expected a weight for {missing[0]}, found none for it and {len(missing) - 1} more; "
            "download the checkpoint again"
        )
    if unexpected := sorted(shapes.keys() - expected.keys()):
        raise UserError(
            f"{name}: expected EgoGPT's weights alone, found {unexpected[0]} and {len(unexpected) - 1} more; "
            "only checkpoints in EgoGPT's own layout can be converted"
        )
    for key, shape in expected.items():
        if shapes[key] != shape:
            raise UserError(
                f"{name}: {key}: expected the shape {list(shape)} that config.json gives, found {list(shapes[key])}; "
                "download the checkpoint again"
            )


def _speech(settings: dict[str, Any], config: EgoGptConfig, shapes: Shapes, name: str) -> Speech:
    """Return the speech modules, without their weights, in the sizes that the shapes determine."""
    width, mels, _ = _shape(shapes, "speech.encoder.conv1.weight", name)
    encoder = WhisperConfig(
        d_model=width,
        num_mel_bins=mels,
        encoder_layers=_layers(shapes, "speech.encoder.layers"),
        encoder_attention_heads=width // SPEECH_HEAD_DIM,
        encoder_ffn_dim=_shape(shapes, "speech.encoder.layers.0.fc1.weight", name)[0],
        max_source_positions=_shape(shapes, "speech.encoder.embed_positions.weight", name)[0],
    )
    projected = _shape(shapes, "speech.projector.linear1.weight", name)[0]
    return Speech(encoder, settings[RATE], projected, config.text_config.hidden_size)


@torch.inference_mode()
def _write_weights(files: list[Path], folder: Path, speech: Speech) -> None:
    """Write the renamed shards, one more shard with the features of silence, and the index."""
    places: dict[str, str] = {}
    size = 0
    for number, part in enumerate(_parts(files, speech), start=1):
        file = f"model-{number:05}-of-{len(files) + 1:05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
        size += sum(value.nbytes for value in part.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": places})


def _parts(files: list[Path], speech: Speech) -> Iterator[dict[str, Tensor]]:
    """Yield the renamed weights of each file without those of speech, then the features of silence."""
    speech_weights = {}
    for path in files:
        part = {}
        with safe_open(path, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118, safe_open is not a mapping
                ours, value = _rename(key), weights.get_tensor(key)
                if ours.startswith("speech."):
                    speech_weights[ours.removeprefix("speech.")] = value.float()
                else:
                    part[ours] = value
        yield part
    speech.load_state_dict(speech_weights, assign=True)
    # In float32, whatever the dtype of the other weights, so that it is rounded only once, on loading.
    yield {"model.silence": speech.eval().silence()}
