"""Write checkpoints with random weights and tokenizers, of any size.

Checkpoints are written shard by shard, so that one of 16 GB needs 2 GB of memory.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForImageTextToText, PretrainedConfig, Qwen2Tokenizer

from firstsight.acquisition.initialise import SPECIAL_TOKENS, train_tokenizer

_SHARD_BYTES = 2 << 30


def padded_tokenizer(corpus: Sequence[str], words: int, tokens: int) -> Qwen2Tokenizer:
    """Return a tokenizer trained on the corpus and padded to `tokens` tokens, most of which never occur."""
    small = json.loads(train_tokenizer(corpus, words).backend_tokenizer.to_str())["model"]
    learned = {token: place for token, place in small["vocab"].items() if token not in SPECIAL_TOKENS}
    names = [*learned, *(f"filler-{n}" for n in range(tokens - len(learned) - len(SPECIAL_TOKENS))), *SPECIAL_TOKENS]
    return Qwen2Tokenizer(
        vocab={name: place for place, name in enumerate(names)},
        merges=[tuple(pair) for pair in small["merges"]],
        extra_special_tokens=list(SPECIAL_TOKENS),
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
    )


# Returns weights of a shape, those of a norm where the second argument is true.
Draw = Callable[[tuple[int, ...], bool, torch.Generator], torch.Tensor]


def normal(shape: tuple[int, ...], norm: bool, generator: torch.Generator) -> torch.Tensor:
    """Return weights with standard deviation 0.02, or those of a norm, which are one: outputs are finite."""
    return (
        torch.ones(shape) if norm else torch.empty(shape, device=generator.device).normal_(0, 0.02, generator=generator)
    )


def write_random(config: PretrainedConfig, folder: Path, dtype: torch.dtype, draw: Draw = normal) -> None:
    """Write a checkpoint of `config`'s architecture into `folder`: sharded safetensors with an index, as on the hub.

    Weights are drawn by `draw`, biases are zero.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.config.save_pretrained(folder)
    norms = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0)
    parameters = dict(model.named_parameters())  # tied ones once
    shards: list[list[str]] = [[]]
    room = _SHARD_BYTES
    for name, parameter in parameters.items():
        if room < 0:
            shards.append([])
            room = _SHARD_BYTES
        shards[-1].append(name)
        room -= parameter.nbytes
    files = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weights = {name: _weight(name, parameters[name], norms, generator, draw) for name in names}
        save_file(weights, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    size = sum(parameter.nbytes for parameter in parameters.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _weight(
    name: str, parameter: nn.Parameter, norms: set[str], generator: torch.Generator, draw: Draw
) -> torch.Tensor:
    if name.endswith(".bias"):
        return torch.zeros(parameter.shape, dtype=parameter.dtype)
    return draw(tuple(parameter.shape), name.rsplit(".", 1)[0] in norms, generator).to("cpu", parameter.dtype)
