"""Checkpoints of language models, tiny and random, in the layout of those on the hub."""

import json
from pathlib import Path

import torch
from conftest import YAML_SAFE, make_sample, run_stage, workspace, write_params
from families import TEXT, TEXT_TEMPLATE
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (
    BertConfig,
    BertForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from firstsight.records.parquet import SplitWriter

GPT2_POSITIONS = 96
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# In the order of DeepSeek-R1-Distill-Qwen-1.5B, whose text tokens are Qwen2's.
DEEPSEEK_TOKENS = (
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜begin▁of▁sentence｜>",
    "<|EOT|>",
    "<think>",
    "</think>",
)
# DeepSeek's, without tools: a prompt ends in an opened thought, and a past turn has none.
DEEPSEEK_TEMPLATE = (
    "{{bos_token}}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)


def write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False))


def byte_level(words: Qwen2Tokenizer, special: tuple[str, ...], split_as_qwen: bool = True) -> Tokenizer:
    """The words and merges of a tokenizer, with other special tokens after them."""
    learned = json.loads(words.backend_tokenizer.to_str())["model"]
    added = set(words.added_tokens_decoder.values())
    text = {token: index for token, index in learned["vocab"].items() if token not in set(map(str, added))}
    tokenizer = Tokenizer(BPE(text, [tuple(pair) for pair in learned["merges"]]))
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = words.backend_tokenizer.pre_tokenizer if split_as_qwen else byte
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def save_gpt2(folder: Path, settings, processor, layers: int = 2) -> None:
    """GPT-2: no chat template, no padding token, learned positions, Conv1D layers, and masks stored with weights."""
    tokenizer = byte_level(processor.tokenizer, ("<|endoftext|>",), split_as_qwen=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder / "tokenizer_config.json", {"model_max_length": GPT2_POSITIONS})
    end = tokenizer.token_to_id("<|endoftext|>")
    torch.manual_seed(layers)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=GPT2_POSITIONS,
        n_embd=64,
        n_layer=layers,
        n_head=4,
        bos_token_id=end,
        eos_token_id=end,
        initializer_range=0.08,
    )
    model = GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    weights = {name.removeprefix("transformer."): value for name, value in model.state_dict().items()}
    del weights["lm_head.weight"]
    mask = torch.tril(torch.ones(GPT2_POSITIONS, GPT2_POSITIONS))[None, None]
    masks = {f"h.{number}.attn.bias": mask.clone() for number in range(layers)}
    save_file(weights | masks, folder / "model.safetensors", metadata={"format": "pt"})


def save_qwen2_instruct(folder: Path, settings, processor) -> None:
    _save_qwen2(folder, processor, eos="<|im_end|>", ends=["<|im_end|>", "<|endoftext|>"])


def save_qwen2_base(folder: Path, settings, processor) -> None:
    """Qwen2.5-0.5B: a template that ends turns with `<|im_end|>`, and a model that ends texts with `<|endoftext|>`."""
    _save_qwen2(folder, processor, eos="<|endoftext|>", ends=["<|endoftext|>"])


def _save_qwen2(folder: Path, processor, eos: str, ends: list[str]) -> None:
    tokenizer = byte_level(processor.tokenizer, QWEN_TOKENS)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": TEXT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write(folder / "tokenizer_config.json", settings)
    torch.manual_seed(1)
    token = tokenizer.token_to_id
    config = Qwen2Config(
        **TEXT,
        vocab_size=tokenizer.get_vocab_size() + 13,
        tie_word_embeddings=True,
        bos_token_id=token("<|endoftext|>"),
        eos_token_id=token(eos),
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    generation = {"bos_token_id": token("<|endoftext|>"), "do_sample": False, "eos_token_id": [*map(token, ends)]}
    write(folder / "generation_config.json", generation | {"max_new_tokens": 2048})


def save_deepseek(folder: Path, settings, processor) -> None:
    """DeepSeek-R1-Distill-Qwen: Qwen2's words, other special tokens, a begin token, thoughts, a Llama tokenizer."""
    tokenizer = byte_level(processor.tokenizer, DEEPSEEK_TOKENS)
    begin, end = DEEPSEEK_TOKENS[3], DEEPSEEK_TOKENS[0]
    token = tokenizer.token_to_id
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, token(begin))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))

    def added(content: str) -> dict:
        plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": content} | plain

    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": added(begin),
        "chat_template": DEEPSEEK_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": added(end),
        "legacy": True,
        "model_max_length": 16384,
        "pad_token": added(end),
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizerFast",
        "unk_token": None,
        "use_default_system_prompt": False,
    }
    write(folder / "tokenizer_config.json", settings)
    torch.manual_seed(2)
    config = Qwen2Config(
        **TEXT,
        vocab_size=tokenizer.get_vocab_size() + 25,
        tie_word_embeddings=False,
        bos_token_id=token(begin),
        eos_token_id=token(end),
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    generation = {"bos_token_id": token(begin), "do_sample": True, "eos_token_id": token(end), "temperature": 0.6}
    write(folder / "generation_config.json", generation | {"top_p": 0.95})


BERT_POSITIONS = 64
BERT_WORDS = ("what", "is", "at", "place", "which", "class", "thing", "animal", "plant", "cup", "two", "red", "left")


def save_bert(folder: Path, seed: int = 4, layers: int = 2) -> None:
    """bert-tiny: a vocabulary without tokenizer.json, a masked language model's head, positions' numbers stored."""
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *letters, *(f"##{one}" for one in letters), *BERT_WORDS]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=BERT_POSITIONS,
    )
    torch.manual_seed(seed)
    model = BertForPreTraining(config)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["bert.embeddings.position_ids"] = torch.arange(BERT_POSITIONS)[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


TEXT_SAVE = {
    "gpt2": save_gpt2,
    "qwen2-instruct": save_qwen2_instruct,
    "qwen2-base": save_qwen2_base,
    "deepseek": save_deepseek,
}

ANSWERS = ["a red cup", "two", "a ball", "in your left hand"]


def write_split(folder, split, questions, kind="none"):
    with SplitWriter(folder / f"data/egoqa/{split}.parquet") as writer:
        for number, question in enumerate(questions):
            writer.write(make_sample(f"{split}-{number}", kind, int(kind != "none"), [question]))


def text_workspace(folder, settings, processor, teacher: str, student: str):
    """A workspace with text-only data and a pair of checkpoints, all stages up to the dataset done."""
    folder = workspace(folder)
    document = YAML_SAFE.load(folder / "params.yaml")
    for role, name in (("teacher", teacher), ("student", student)):
        (folder / "hub" / role).mkdir(parents=True)
        TEXT_SAVE[name](folder / "hub" / role, settings, processor)
        document["models"][role] = {"source": f"hub/{role}", "revision": None, "init": None}
    document["finetune_teacher"] |= {"enabled": True, "epochs": 2, "train_vision": False}
    document["train"] |= {"epochs": 4, "early_stopping_epochs": 4, "alpha": 1.0, "learning_rate": 5e-3}
    document["control"]["enabled"] = False
    document["export"] |= {"formats": [], "teacher": False}
    write_params(folder, document)
    (folder / "data/egoqa").mkdir(parents=True)
    for split in ("train", "validation", "test"):
        write_split(folder, split, [(f"What is at place {n % 4}?", ANSWERS[n % 4]) for n in range(12)])
    for role in ("teacher", "student"):
        run_stage(folder, "download_models", role)
    return folder
