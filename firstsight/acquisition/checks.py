"""Check that a Hugging Face checkpoint can be used, and collect facts about it, without loading its weights.

Only safetensors and text files are accepted: reading a pickle can run code, and so can a checkpoint that brings the
code of its own model class.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack, nullcontext
from math import prod
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import metadata_load
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from firstsight.acquisition import egogpt_conversion
from firstsight.core.errors import UserError
from firstsight.models import int4
from firstsight.models.architecture import auto_class, in_head, is_encoder
from firstsight.models.loading import ADAPTER
from firstsight.models.processors import load_processor
from firstsight.models.quantized import stored_method

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, SUMS = "tokenizer.json", "SHA256SUMS"
# The text files that say how weights are used (`*.model` is SentencePiece's vocabulary).
TEXT = ("*.json", "*.txt", "*.jinja", "*.model", "README.md", "LICENSE*")
_PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}
# peft's files of an adapter. In the model's own folder, transformers would load it into the model.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The suffixes of what bitsandbytes stores with a quantized weight.
_SCALES = (".SCB", ".weight_format", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


def check_sums(folder: Path) -> None:
    """Raise UserError unless all files that the folder's SHA256SUMS lists are there and have their checksums."""
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        expected, name = line.split(maxsplit=1)
        name = name.removeprefix("*")  # before files that sha256sum --binary has read
        try:
            with (folder / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            found = error.strerror
        if found != expected:
            raise UserError(
                f"{folder / name}: expected the file of {folder / SUMS} ({expected[:12]}), found {found[:40]}; restore "
                f"it (git restore {folder}), or delete {SUMS} if the change is yours"
            )


def check_texts(folder: Path, present: Collection[str], place: str) -> list[str]:
    """Check what the small files of a checkpoint show, before the large ones are downloaded or copied.

    Args:
        folder: has at least the checkpoint's text files.
        present: the names of all its files, local or still on the hub; those of its adapter include the folder.
        place: what errors call the checkpoint.

    Returns:
        The names of the large files: the weights and, if there is one, the files of the adapter.

    Raises:
        UserError: the config or the processor cannot be used, the architecture is unknown, the quantization is not
            supported, an adapter is not in its folder, or as for `weight_files`.
    """
    if ADAPTER_CONFIG in present:
        raise UserError(
            f"{place}: expected a model alone, found an adapter in its folder ({ADAPTER_CONFIG}); merge it (peft's "
            f"merge_and_unload) and save that, or move {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} to {ADAPTER}/ beside it"
        )
    check_config(folder, place)
    large = weight_files(folder, present, place) + adapter_files(present, place)
    if egogpt_conversion.is_original(folder / CONFIG):
        egogpt_conversion.check_texts(folder, place)
    else:
        load_processor(folder, place, "get its tokenizer, processor and chat template, or name a complete checkpoint")
    return large


def adapter_files(present: Collection[str], place: str) -> list[str]:
    """Return the names of the files of the model's peft adapter, in the folder `adapter`; [] without one.

    Raises UserError when its weights are not safetensors.
    """
    config, weights = f"{ADAPTER}/{ADAPTER_CONFIG}", f"{ADAPTER}/{ADAPTER_WEIGHTS}"
    if config not in present:
        return []
    if weights not in present:
        found = sorted(name for name in present if name.startswith(f"{ADAPTER}/"))
        raise UserError(
            f"{place}: expected {weights} beside {config}, found {found}; save the adapter again with "
            "save_pretrained, or remove the folder to take the model without it"
        )
    return [config, weights]


def weight_files(folder: Path, present: Collection[str], place: str) -> list[str]:
    """Return the names of the files that transformers reads weights from: one file, or the shards of an index.

    Args:
        folder: has at least the checkpoint's text files.
        present: the names of all its files, local or still on the hub.
        place: what errors call the checkpoint.

    Raises:
        UserError: the weights are pickles or missing, the index is broken, or one of its shards is missing.
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
    # Only names: a path would lead out of the checkpoint's folder.
    if wrong := [name for name in shards if not name.endswith(".safetensors") or "/" in name] or not shards:
        raise UserError(
            f"{place}: expected {INDEX} to name *.safetensors files, found {wrong[0] if shards else 'no shard'}; "
            "get the checkpoint again, or name a revision that has safetensors"
        )
    if absent := [name for name in shards if name not in present]:
        raise UserError(
            f"{place}: expected the {len(shards)} shards that {INDEX} names, found no {absent[0]}"
            f" ({len(absent)} missing); get the checkpoint again, or name a complete revision"
        )
    return shards


def check_config(folder: Path, place: str) -> None:
    """Raise UserError unless transformers has a class for the checkpoint, or it is EgoGPT's and will be converted."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{place}: expected a {CONFIG} that can be read, found {error}; name a Hugging Face model folder"
        ) from None
    if egogpt_conversion.is_original(folder / CONFIG):
        return
    quantized = config.get("quantization_config", config.get("compression_config"))
    if quantized is not None:
        known = isinstance(quantized, dict) and (quantized.get("load_in_8bit") or quantized.get("load_in_4bit"))
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        by_bitsandbytes = known and method in (None, "bitsandbytes")
        if not by_bitsandbytes and not (isinstance(quantized, dict) and int4.is_int4(quantized)):
            raise UserError(
                f"{place}: expected weights that are unquantized, or quantized by bitsandbytes or FirstSight's int4, "
                f"found them quantized by {method!r}; name the checkpoint that this one was made from"
            )
    # Many repositories bring code from before transformers had their class; that code is not needed.
    if not isinstance(kind, str) or auto_class(kind) is None:
        own = " with code of its own (auto_map), which is not run" if "auto_map" in config else ""
        raise UserError(
            f"{place}: expected an architecture that transformers has for text answers, found model_type "
            f"{kind!r}{own}; name such a model, for example Qwen2-VL or LLaVA-OneVision"
        )
    try:
        AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # libraries raise many kinds of error over invalid values
        found = " ".join(str(error).split())[:200]
        raise UserError(f"{place}: expected a {CONFIG} that can be read, found {found}; get it again") from None


def check_weights(folder: Path, place: str) -> None:
    """Raise UserError unless every weight is present, complete, and of the shape that config.json implies.

    transformers loads the checkpoint onto the meta device, which applies its rules for old names and tied weights, and
    allocates no memory for weights. For quantized weights, only the number of elements is compared.
    """
    present = names(folder)
    for name in weight_files(folder, present, place) + adapter_files(present, place)[1:]:
        for _ in _headers(folder / name):
            pass
    if egogpt_conversion.is_original(folder / CONFIG):
        return  # the conversion compares names and shapes
    try:
        differing = _differing(folder)
    except Exception as error:  # libraries raise many kinds of error over invalid values
        found = " ".join(str(error).split())[:200]
    else:
        if not differing:
            return
        found = f"{len(differing)} that do not fit ({sorted(differing)[0]})"
    raise UserError(f"{place}: expected the weights that {CONFIG} describes, found {found}; get the checkpoint again")


def _differing(folder: Path) -> list[str]:
    """Return a line for each weight that is missing, not in the model, or of another shape than its config implies."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # Load it as unquantized: packed weights cannot be unpacked on the meta device.
    quantized, in_int4 = hasattr(config, "quantization_config"), stored_method(folder) == "int4"
    if quantized and not in_int4:
        del config.quantization_config
    with int4.loading(config) if in_int4 else nullcontext():
        model, info = auto_class(config.model_type).from_pretrained(
            folder,
            config=config,
            device_map="meta",
            ignore_mismatched_sizes=True,  # so that they are reported by name instead of raising an error
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    unexpected, missing = info["unexpected_keys"], info["missing_keys"]
    mismatched = info["mismatched_keys"]
    if is_encoder(config.model_type):  # it gets a head of its own, and old checkpoints store the positions' numbers
        prefix = model.base_model_prefix
        missing = [name for name in missing if not in_head(name, prefix)]
        unexpected = [name for name in unexpected if not (in_head(name, prefix) or name.endswith("position_ids"))]
        mismatched = [one for one in mismatched if not in_head(one[0], prefix)]
    if quantized:
        unexpected = [name for name in unexpected if not name.endswith(_SCALES) and ".quant_state." not in name]
        # bitsandbytes packs two 4-bit weights into a byte, in one column.
        mismatched = [
            (name, stored, built) for name, stored, built in mismatched if tuple(stored) != ((prod(built) + 1) // 2, 1)
        ]
    return [
        *(f"{name}: {list(stored)} instead of {list(built)}" for name, stored, built in mismatched),
        *(f"{name}: missing" for name in missing),
        *(f"{name}: not in the model" for name in unexpected),
    ]


def complete_tokenizer(folder: Path, place: str) -> None:
    """Write tokenizer.json, which stages depend on, if a checkpoint has only the tokenizer's vocabulary and merges.

    Raises UserError when the tokenizer has no such form.
    """
    if (folder / TOKENIZER).exists():
        return
    tokenizer = load_processor(folder, place).tokenizer
    if not tokenizer.is_fast:
        raise UserError(
            f"{place}: expected a tokenizer that {TOKENIZER} can hold, found {type(tokenizer).__name__}; "
            "name a checkpoint that has one"
        )
    tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))


def facts(folder: Path) -> dict[str, Any]:
    """Return licence, architecture and sizes of a checked checkpoint, from its text files and the weights' headers.

    `parameters` and `dtypes` (parameters by dtype) count stored elements: tied weights once, quantized weights as
    packed. `licence` is the model card's, else the name of a licence file, else None. `bytes` is the size of all files.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    dtypes: Counter[str] = Counter()
    present = names(folder)
    files = [folder / name for name in weight_files(folder, present, str(folder))]
    stored = {name: (path, *kind) for path in files for name, *kind in _headers(path)}
    # A bias of four dimensions is an attention mask, which checkpoints of GPT-2 store with the weights.
    masks = [name for name, (_, _, shape) in stored.items() if name.endswith(".bias") and len(shape) == 4]
    for name in (*_stored_twice(stored), *masks):
        del stored[name]
    for _, dtype, shape in stored.values():
        dtypes[dtype] += prod(shape)
    return {
        "licence": _licence(folder),
        "architecture": config["architectures"][0] if config.get("architectures") else None,
        "model_type": config["model_type"],
        "parameters": dtypes.total(),
        "dtypes": dict(dtypes.most_common()),
        "bytes": sum((folder / name).stat().st_size for name in present),
    }


def names(folder: Path) -> set[str]:
    """Return the names of a checkpoint's files; those of its adapter include the folder."""
    inside = {f"{ADAPTER}/{path.name}" for path in (folder / ADAPTER).glob("*") if path.is_file()}
    return {path.name for path in folder.iterdir() if path.is_file()} | inside


def _headers(path: Path) -> Iterator[tuple[str, str, list[int]]]:
    """Yield name, dtype and shape of every tensor of a safetensors file.

    Raises UserError when the file is broken or truncated.
    """
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, safe_open is not a mapping
                yield name, (part := file.get_slice(name)).get_dtype(), part.get_shape()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: expected safetensors, found a broken file ({error}); download it again") from None


def _stored_twice(stored: dict[str, tuple[Path, str, list[int]]]) -> list[str]:
    """Return the output head's name, in a list, if it is stored with the same values as the embedding; else []."""
    heads, embeddings = (
        [name for name in stored if name.endswith(end)] for end in ("lm_head.weight", "embed_tokens.weight")
    )
    if len(heads) != 1 or len(embeddings) != 1 or stored[heads[0]][1:] != stored[embeddings[0]][1:]:
        return []
    parts = []
    with ExitStack() as stack:
        for name in (*heads, *embeddings):
            file = stack.enter_context(safe_open(stored[name][0], framework="pt"))
            parts.append(file.get_slice(name))
        # Comparing a few rows first is enough for most pairs that differ.
        same = torch.equal(parts[0][:8], parts[1][:8]) and torch.equal(parts[0][:], parts[1][:])
    return heads if same else []


def _licence(folder: Path) -> str | None:
    """Return the licence of the model card, else the name of a licence file, else None."""
    try:
        card = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        card = {}
    # "other" is the hub's word for a licence that it has no identifier for.
    named = card.get("license_name") if card.get("license") == "other" else card.get("license")
    return str(named) if named else next((path.name for path in sorted(folder.glob("LICENSE*"))), None)
