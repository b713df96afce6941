"""Say which architectures are exported to ONNX, by their config alone."""

from pathlib import Path

from transformers import AutoConfig, AutoModelForImageTextToText

from firstsight.core.errors import UserError
from firstsight.models.architecture import auto_class, is_encoder

# The one vision-language model whose vision tower and processor are known to firstsight.export.
VISION_MODEL = "qwen2_vl"
# The encoders whose graphs have been compared with them, at all lengths (tests/test_class_export.py).
ENCODERS = ("bert", "distilbert", "electra", "roberta", "xlm-roberta")


def check_architecture(source: Path) -> None:
    """Raise UserError unless the model in `source` is exported.

    That is Qwen2-VL, a language model of text alone with grouped keys and values, or one of `ENCODERS`.
    """
    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    if is_encoder(config.model_type):
        if config.model_type not in ENCODERS:
            raise UserError(
                f"{source}: expected an encoder that is exported to ONNX ({', '.join(ENCODERS)}), found model_type "
                f"{config.model_type!r}; leave its export out (export.formats: [], or export.teacher: false)"
            )
        return
    kind, grouped = config.model_type, hasattr(config.get_text_config(), "num_key_value_heads")
    if (auto_class(kind) is AutoModelForImageTextToText and kind != VISION_MODEL) or not grouped:
        raise UserError(
            f"{source}: expected Qwen2-VL or a model of text alone such as Qwen2, which are exported to ONNX, found "
            f"model_type {kind!r}; leave its export out (export.formats: [], or export.teacher: false, in params.yaml)"
        )
