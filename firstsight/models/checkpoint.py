"""What a Hugging Face checkpoint is, found out without building its model: fit to be used, or refused; and its facts.

Safetensors and text only: a pickle runs code when it is read, and so does a checkpoint whose class is a file of its
own.
"""

import json
import logging
from collections import Counter
from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from firstsight.core.errors import UserError
from firstsight.models import egogpt_conversion
from firstsight.models.architecture import auto_class

# It prints a table of what does not fit; `check_weights` says it in one line.
logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# The text files that say how weights are used (`*.model` is SentencePiece's vocabulary).
TEXT = ("*.json", "*.txt", "*.jinja", "*.model", "README.md", "LICENSE*")
_PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}


def weight_files(folder: Path, present: Collection[str], place: str) -> list[str]:
    """The names of the files that transformers reads weights from: one, or the shards of the index in `folder`.

    Args:
        folder: the checkpoint's text files, at least.
        present: the names of all its files, here or still on the hub.
        place: what to call the checkpoint in an error.

    Raises:
        UserError: its weights are pickles, or there are none; the index is broken, or a shard of it is missing.
    """
    if WEIGHTS in present:
        return [WEIGHTS]
    if INDEX not in present:
        pickles = sorted(name for name in present if Path(name).suffix in _PICKLES)
        found = f"pickles ({pickles[0]}), which can run code when read" if pickles else f"{sorted(present)[:8]}"
        raise UserError(
            f"{place}: expected {WEIGHTS}, or shards and {INDEX}, found {found}; name a revision that has safetensors, "
            "or a folder you have converted with save_pretrained"
        )
    try:
        shards = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{place}: expected a weight_map in {INDEX}, found {error!r}; get the checkpoint again"
        ) from None
    if absent := [name for name in shards if name not in present]:
        raise UserError(
            f"{place}: expected the {len(shards)} shards that {INDEX} names, found no {absent[0]}"
            f" ({len(absent)} missing); get the checkpoint again, or name a complete revision"
        )
    return shards


def check_config(folder: Path, place: str) -> None:
    """Raise UserError unless transformers itself has a class for the checkpoint, or it is one to be converted."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{place}: expected a {CONFIG} that can be read, found {error}; name a Hugging Face model folder"
        ) from None
    if egogpt_conversion.is_original(folder / CONFIG):
        return
    # Many repositories carry code from before transformers had their class; then it is not needed.
    if auto_class(kind) is None:
        own = ", and code of its own to run (auto_map), which is refused" if "auto_map" in config else ""
        raise UserError(
            f"{place}: expected an architecture that transformers knows to answer in text, found model_type "
            f"{kind!r}{own}; take such a model, Qwen2-VL or LLaVA-OneVision for one"
        )


def check_weights(folder: Path, place: str) -> None:
    """Raise UserError unless every weight is there, whole, and of the shape that config.json says.

    transformers loads the checkpoint onto the meta device: its names for old and new layouts and its rules for tied
    weights, and no memory for weights.
    """
    for name in weight_files(folder, _names(folder), place):
        _headers(folder / name)
    if egogpt_conversion.is_original(folder / CONFIG):
        return  # its conversion compares them
    # Quantised weights are packed: their shapes are not those of the config.
    if "quantization_config" in json.loads((folder / CONFIG).read_text(encoding="utf-8")):
        return
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _, info = auto_class(config.model_type).from_pretrained(
            folder,
            device_map="meta",
            ignore_mismatched_sizes=True,  # they are reported, instead of raised without a name
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except Exception as error:  # whatever libraries raise over values that make no model
        found = " ".join(str(error).split())[:200]
    else:
        differing = [
            *(f"{name}: {list(stored)} instead of {list(built)}" for name, stored, built in info["mismatched_keys"]),
            *(f"{name}: missing" for name in info["missing_keys"]),
            *(f"{name}: not in the model" for name in info["unexpected_keys"]),
        ]
        if not differing:
            return
        found = f"{len(differing)} that do not fit ({sorted(differing)[0]})"
    raise UserError(f"{place}: expected the weights that {CONFIG} describes, found {found}; get the checkpoint again")


def facts(folder: Path) -> dict[str, Any]:
    """Of a checked checkpoint: licence, architecture, and sizes, from its text files and the weights' headers.

    `parameters` and `dtypes` (a number of parameters each) count what is stored: tied weights once, quantised weights
    as they are packed. `licence` is what the model card says, else the name of a licence file, else None. `bytes` are
    those of all files.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    dtypes: Counter[str] = Counter()
    for name in weight_files(folder, _names(folder), str(folder)):
        for dtype, shape in _headers(folder / name):
            dtypes[dtype] += prod(shape)
    return {
        "licence": _licence(folder),
        "architecture": config["architectures"][0] if config.get("architectures") else None,
        "model_type": config["model_type"],
        "parameters": dtypes.total(),
        "dtypes": dict(dtypes.most_common()),
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
    }


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _headers(path: Path) -> list[tuple[str, list[int]]]:
    """Dtype and shape of every tensor of a safetensors file. Raises UserError when it is broken or cut short."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118, no mapping
            return [(part.get_dtype(), part.get_shape()) for part in slices]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: expected safetensors, found a broken file ({error}); download it again") from None


def _licence(folder: Path) -> str | None:
    try:
        card = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        card = {}
    # "other" is the hub's word for a licence that it has no identifier for.
    named = card.get("license_name") if card.get("license") == "other" else card.get("license")
    return str(named) if named else next((path.name for path in sorted(folder.glob("LICENSE*"))), None)
