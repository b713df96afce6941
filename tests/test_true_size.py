"""Qwen2-VL-2B at its true size, with random weights: it loads, answers and is quantized on the CPU."""

import pytest
import torch
from conftest import make_sample

from benchmarks.checkpoints import write_random
from benchmarks.distill_step import config
from firstsight.generation.answering import answers
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.planning.shapes import QWEN2_VL_2B
from firstsight.quantization.quantize import quantize_folder

pytestmark = pytest.mark.slow


def test_the_2b_student_loads_answers_and_is_quantized(processor, settings, tmp_path):
    folder, quantized = tmp_path / "student", tmp_path / "quantized"
    for path in (folder, quantized):
        path.mkdir()
    write_random(config(QWEN2_VL_2B, 1, processor.tokenizer), folder, torch.bfloat16)
    processor.save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) == 3
    sample = make_sample("image", "image", 1, [("What is in your left hand?", "a cup")])

    model = load_model(folder, "bfloat16", "cpu")
    assert model.num_parameters() == 2_208_985_600
    assert next(model.parameters()).dtype == torch.bfloat16
    assert len(list(answers(model, load_processor(folder), [(sample, sample.records[0])], 1, 2))) == 1
    del model

    # Seven layers in each of 28 blocks; the head and all of the vision tower are kept.
    counts = quantize_folder(folder, quantized, "nf4", settings.quantize, "cpu", [(sample, sample.records[0])])
    assert counts["quantized_layers"] == 28 * 7 == len(counts["errors"])
    # What NF4 does to normally distributed weights, whatever the inputs.
    assert 0.05 < min(counts["errors"].values()) <= max(counts["errors"].values()) < 0.15
    sizes = [sum(path.stat().st_size for path in one.glob("*.safetensors")) for one in (folder, quantized)]
    assert sizes[0] == pytest.approx(2 * 2_208_985_600, rel=1e-3)
    # 1.31 of the 2.21 billion parameters go from 16 bits to about 4.1.
    assert sizes[1] < 0.6 * sizes[0]
    model = load_model(quantized, "auto", "cpu")
    assert len(list(answers(model, load_processor(quantized), [(sample, sample.records[0])], 1, 2))) == 1
