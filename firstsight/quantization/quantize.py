"""Quantising a model folder with bitsandbytes into another that `from_pretrained` loads quantised."""

from pathlib import Path

from firstsight.models.loading import check_quantised, load_model, load_processor


def quantize_folder(source: Path, target: Path, method: str, device: str) -> dict[str, int]:
    """Load `source` as "int8" or "nf4", save it with its processor in `target`, and count linear layers by kind."""
    model = load_model(source, method, device)
    counts = check_quantised(model)
    model.save_pretrained(target)
    load_processor(source).save_pretrained(target)
    return counts
