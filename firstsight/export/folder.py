"""Export a model folder to one that runs without torch, and compare the two before it is kept."""

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from firstsight.core.errors import UserError
from firstsight.core.faults import check_disk_space
from firstsight.engine.class_scores import open_exported
from firstsight.engine.exported_model import ExportedModel
from firstsight.engine.layout import CHAT_TEMPLATE, TOKENIZER, VERSION, Check, Layout, Pictures
from firstsight.export.graphs import cache_shape, write_encoder, write_graphs
from firstsight.generation.answering import Question, answers, end_tokens, model_inputs
from firstsight.models.exportable import VISION_MODEL, check_architecture
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.models.text_processor import EncoderProcessor
from firstsight.packing.dataset import class_batch
from firstsight.packing.forward import class_scores
from firstsight.records.parquet import Split

# What torch.onnx, the quantizer and the comparison need.
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# What the processor must do with pictures, because `firstsight.engine.pictures` does it.
_PROCESSING = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3}
# The largest difference of float32 logits, as a share of the largest logit: more is no rounding.
_TOLERANCE = 1e-3
# How many questions are compared at once, so that padding is; and the most tokens of their answers.
_BATCH, _TOKENS = 4, 16
_COMPARED = 32
# At most, of a weight in 8 or 4 bits with its share of a scale; few weights are not quantized.
_QUANTIZED_BYTES = 1.2


@dataclass(frozen=True)
class Expected:
    """Hold what the original model computes of `questions`: the first token's logits [B, V] by batch, and answers.

    Where the model scores C classes, it is their scores [B, C], and the names of the best.
    """

    questions: Sequence[Question]
    logits: list[np.ndarray]
    answers: list[str]


def export_folders(
    source: Path,
    targets: Mapping[str, Path],
    questions: Sequence[Question],
    calibration: Sequence[Question] = (),
    classes: Sequence[str] = (),
    prompt: str | None = None,
) -> dict[str, Layout]:
    """Export the model in `source`, compare each export with it on `questions`, and return the layouts.

    The model is traced once, in float32; weights of fewer bits are made from those graphs.

    Args:
        targets: an empty folder for each precision of the weights, "float32", "int8" and "w4a8", in any choice.
        calibration: questions by whose tokens 4-bit weights are rounded; without any, to the nearest.
        classes: names of those that the model scores; without any, it answers freely.
        prompt: the template of columns that its questions were made from, if they were.

    Raises:
        UserError: a package is missing, the architecture or its processor is not one that is exported, or the disk is
            too small.
        RuntimeError: float32 graphs do not compute what the model computes: a defect, not a user's mistake.
    """
    check_packages()
    check_architecture(source)
    processor, model = load_processor(source), load_model(source, "float32", "cpu", classes=classes)
    first = next(iter(targets.values()))
    check_disk_space(
        first, _needed_bytes(model, targets), "free some, or take formats out of export (its section in params.yaml)"
    )
    expected, config = _expected(model, processor, questions, classes), model.config
    layout = _layout(model, processor).model_copy(update={"classes": tuple(classes), "prompt": prompt})
    with TemporaryDirectory(dir=first) as temporary:
        traced = targets.get("float32", Path(temporary))
        (write_encoder if layout.encoder else write_graphs)(model, traced)
        for folder in {traced, *targets.values()}:
            processor.save_pretrained(folder)
            config.save_pretrained(folder)
        layout.write(traced)
        # The quantizer holds weights in float32 as well, and the memory may have no room for both. What torch.export
        # leaves behind refers to the model in cycles.
        del model
        gc.collect()
        for weights, target in targets.items():
            if weights != "float32":
                from firstsight.export.weights import quantize_graphs  # onnx takes a second to import

                quantize_graphs(traced, target, weights)
        errors = {}
        if "w4a8" in targets and calibration:
            from firstsight.export.calibration import moments
            from firstsight.export.weights import round_by_inputs

            for name, found in moments(traced, calibration, _TOKENS).items():
                errors |= round_by_inputs(traced, targets["w4a8"], name, found)
    layouts = {weights: layout.model_copy(update={"weights": weights}) for weights in targets}
    if errors:
        layouts["w4a8"] = layouts["w4a8"].model_copy(update={"errors": errors})
    return {weights: _completed(target, source, layouts[weights], expected) for weights, target in targets.items()}


def _completed(target: Path, source: Path, layout: Layout, expected: Expected) -> Layout:
    """Write the layout of a folder of graphs, compare the folder with the original, and return its whole layout."""
    if not (target / TOKENIZER).is_file():
        raise UserError(
            f"{source}: expected a tokenizer that the library tokenizers runs, found one without {TOKENIZER}; take a "
            "model with such a tokenizer"
        )
    if not (layout.encoder or (target / CHAT_TEMPLATE).is_file()):
        raise UserError(
            f"{source}: expected one chat template, found several or none; give the model a chat_template.jinja"
        )
    size = sum(path.stat().st_size for path in target.glob("*.onnx.data"))
    layout = layout.model_copy(update={"weights_bytes": size})
    layout.write(target)
    if expected.questions:
        layout = layout.model_copy(update={"check": compare(expected, open_exported(target))})
        layout.write(target)
    return layout


def check_packages() -> None:
    """Raise UserError unless everything that exporting needs is installed."""
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise UserError(
            f"{missing[0]}: expected what exporting to ONNX needs, found it missing; pip install -r requirements.txt, "
            "or leave the exports out (export.formats: [] and export.teacher: false in params.yaml)"
        )


def spread_questions(path: Path, count: int = _COMPARED) -> list[Question]:
    """Return questions of a split: of at most `count` samples, evenly spread, the first each."""
    return [(sample, sample.records[0]) for sample in Split(path).spread(count)]


@torch.inference_mode()
def _expected(
    model: PreTrainedModel, processor: Any, questions: Sequence[Question], classes: Sequence[str]
) -> Expected:
    if classes:
        scores = [
            class_scores(model, class_batch(processor, some, classes), len(classes)).numpy()
            for some in _batches(questions)
        ]
        return Expected(questions, scores, [classes[best] for one in scores for best in one.argmax(axis=1)])
    return Expected(
        questions,
        [
            model(**model_inputs(processor, some, "cpu"), logits_to_keep=1).logits[:, -1].numpy()
            for some in _batches(questions)
        ],
        list(answers(model, processor, questions, _BATCH, _TOKENS)),
    )


def compare(expected: Expected, exported: ExportedModel) -> Check:
    """Compare logits and greedy answers of the exported model with those of the original.

    Raises:
        RuntimeError: float32 graphs compute other logits.
    """
    difference = 0.0
    for some, logits in zip(_batches(expected.questions), expected.logits, strict=True):
        worst = float(np.abs(exported.first_logits(exported.inputs(some)) - logits).max())
        difference = max(difference, worst)
        if exported.layout.weights == "float32" and worst > _TOLERANCE * max(1.0, np.abs(logits).max()):
            raise RuntimeError(f"expected the logits of the exported model, found them {worst:.3g} apart")
    found = exported.answers(expected.questions, _BATCH, _TOKENS)
    same = sum(one == other for one, other in zip(found, expected.answers, strict=True))
    return Check(questions=len(expected.questions), same_answers=same, logit_difference=difference)


def _batches(questions: Sequence[Question]) -> list[Sequence[Question]]:
    return [questions[start : start + _BATCH] for start in range(0, len(questions), _BATCH)]


def _needed_bytes(model: PreTrainedModel, targets: Mapping[str, Path]) -> int:
    """Return the bytes of the float32 graphs, which are written first, and of all quantized ones.

    The embedding is counted twice, because the decoder's graph holds it as the output head even where both are one.
    """
    numbers = model.num_parameters() + model.get_input_embeddings().weight.numel()
    return math.ceil(numbers * (4 + sum(_QUANTIZED_BYTES for weights in targets if weights != "float32")))


def _layout(model: PreTrainedModel, processor: Any) -> Layout:
    """Return the layout of a model's float32 graphs, which are not written yet."""
    encoder, tokenizer = isinstance(processor, EncoderProcessor), processor.tokenizer
    layers, heads, width = (0, 0, 0) if encoder else cache_shape(model)
    ends = set() if encoder else end_tokens(model, processor)
    pad = tokenizer.pad_token_id
    return Layout(
        version=VERSION,
        weights="float32",
        model_type=model.config.model_type,
        parameters=model.num_parameters(),
        weights_bytes=0,
        layers=layers,
        kv_heads=heads,
        head_dim=width,
        context=processor.positions if encoder else model.config.get_text_config().max_position_embeddings,
        end_tokens=tuple(sorted(ends)),
        pad_token=min(ends) if pad is None else pad,
        special_tokens={name: one for name, one in tokenizer.special_tokens_map.items() if isinstance(one, str)},
        pictures=_pictures(model, processor) if model.config.model_type == VISION_MODEL else None,
        check=None,
        errors={},
    )


def _pictures(model: PreTrainedModel, processor: Any) -> Pictures:
    image, video = processor.image_processor, processor.video_processor
    for one in (image, video):
        found = {name: getattr(one, name) for name in _PROCESSING}
        alike = all(getattr(image, name) == getattr(one, name) for name in ("patch_size", "merge_size", "image_mean"))
        if found != _PROCESSING or not alike or getattr(one, "cap_pixels_per_frame", False):
            raise UserError(
                f"{type(one).__name__}: expected Qwen2-VL's processing of pictures ({_PROCESSING}, images and videos "
                f"alike, cap_pixels_per_frame false), found {found}; correct the model's processor_config.json"
            )
    return Pictures(
        image_token=model.config.image_token_id,
        video_token=model.config.video_token_id,
        patch_size=image.patch_size,
        merge_size=image.merge_size,
        temporal_patch_size=image.temporal_patch_size,
        mean=tuple(image.image_mean),
        std=tuple(image.image_std),
        rescale_factor=image.rescale_factor,
        image_pixels=(image.size["shortest_edge"], image.size["longest_edge"]),
        video_pixels=(video.size["shortest_edge"], video.size["longest_edge"]),
    )
