"""Build models on the meta device, where tensors have shapes but no memory, so that nothing is downloaded.

The sizes of the models that FirstSight is made for are constants here, copied from their config.json on the hub.
"""

import json
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import (
    AutoConfig,
    BertConfig,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2VLConfig,
)

from firstsight.acquisition import egogpt_conversion
from firstsight.acquisition.initialise import build_model, fresh_tokenizer
from firstsight.core.errors import UserError
from firstsight.core.params import Model
from firstsight.models.architecture import auto_class
from firstsight.models.egogpt import EgoGptConfig

# The language models of Qwen2-VL. EgoGPT has the 7B one: both derive from Qwen2-7B.
QWEN2_VL_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152_064,
    "tie_word_embeddings": False,
}
QWEN2_VL_2B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
QWEN25_05B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
# Parameters of Whisper large-v3's encoder and EgoGPT's speech projector: downloaded, but dropped by the conversion.
EGOGPT_SPEECH = 657_421_824
_MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}


def _qwen2_vl(text: dict) -> Qwen2VLConfig:
    return Qwen2VLConfig(
        text_config=text | {"rope_parameters": _MROPE},
        vision_config={
            "depth": 32,
            "embed_dim": 1280,
            "num_heads": 16,
            "hidden_size": text["hidden_size"],
            "mlp_ratio": 4,
        },
        tie_word_embeddings=text["tie_word_embeddings"],
        dtype="bfloat16",
    )


def _egogpt() -> EgoGptConfig:
    """Return the config of converted EgoGPT: SigLIP-so400m without its last layer, constant features for silence."""
    return EgoGptConfig(
        text_config=QWEN2_VL_7B | {"model_type": "qwen2"},
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


KNOWN = {
    "Qwen/Qwen2-VL-7B-Instruct": lambda: _qwen2_vl(QWEN2_VL_7B),
    "Qwen/Qwen2-VL-2B-Instruct": lambda: _qwen2_vl(QWEN2_VL_2B),
    "lmms-lab/EgoGPT-7b-EgoIT": _egogpt,
    "lmms-lab/EgoGPT-7b-EgoIT-EgoLife": _egogpt,
    "lmms-lab/EgoGPT-7b-Demo": _egogpt,
    "openai-community/gpt2": GPT2Config,
    "openai-community/gpt2-medium": lambda: GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    # The language model of Qwen2-VL-2B has the sizes of Qwen2.5-1.5B.
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": lambda: Qwen2Config(
        **QWEN2_VL_2B | {"tie_word_embeddings": False}, dtype="bfloat16"
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": lambda: Qwen2Config(**QWEN2_VL_2B, dtype="bfloat16"),
    **dict.fromkeys(
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct"), lambda: Qwen2Config(**QWEN25_05B, dtype="bfloat16")
    ),
    "google/bert_uncased_L-2_H-128_A-2": lambda: BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512
    ),
}


def on_meta(model: Model) -> PreTrainedModel:
    """Return the model that `models.teacher` or `models.student` names, on the meta device, in its stored precision.

    Raises:
        UserError: its sizes are not known here, or transformers has no such model that answers in text.
    """
    if model.source == "init":
        with torch.device("meta"):
            return build_model(model.init, fresh_tokenizer(model.init))
    config = KNOWN[model.source]() if model.source in KNOWN else _config(model)
    if (builder := auto_class(config.model_type)) is None:
        raise UserError(
            f"{model.source}: expected a model that answers in text, found model_type {config.model_type!r}; "
            f"plan with one of {', '.join(KNOWN)}"
        )
    with torch.device("meta"):
        return builder.from_config(config, dtype=config.dtype or torch.float32)


def _config(model: Model) -> PretrainedConfig:
    """Return the config of a local folder, or of a hub repository whose config.json is in the hub's cache."""
    path = Path(model.source) / "config.json"
    if not path.is_file():
        try:
            cached = try_to_load_from_cache(model.source, "config.json", revision=model.revision)
        except HFValidationError:
            raise UserError(
                f"{model.source}: expected a local folder with a config.json, or a hub repository as owner/name, found "
                "neither; correct models.*.source"
            ) from None
        if not isinstance(cached, str):
            raise UserError(
                f"{model.source}: expected a local folder, or a model whose sizes are known before it is downloaded, "
                f"found neither; fetch its sizes with: hf download {model.source} config.json"
            )
        path = Path(cached)
    if egogpt_conversion.is_original(path):
        return egogpt_conversion.converted_config(path.parent, model.source)
    try:
        return AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    except (ValueError, KeyError, OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path}: expected the config.json of a model that transformers knows, found "
            f"{' '.join(str(error).split())[:120]}; plan with one of {', '.join(KNOWN)}"
        ) from None
