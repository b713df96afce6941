"""Vision towers that attend within images of one size in one call compute the same numbers as image by image."""

import pytest
import torch
from families import SAVE
from torch.nn import functional

from firstsight.models import vision_attention
from firstsight.models.loading import load_model

PATCH_VALUES = 3 * 2 * 14 * 14
# Two images of 4 x 4 patches, a video of three pairs of frames of 4 x 8, and again an image of 4 x 4.
GRID = torch.tensor([[1, 4, 4], [1, 4, 4], [3, 4, 8], [1, 4, 4]])
RUNS = [(16, 2), (32, 3), (16, 1)]


@pytest.mark.parametrize("architecture", ["Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"])
def test_states_and_gradients_are_those_of_image_by_image(architecture, tmp_path, settings, processor):
    SAVE[architecture](tmp_path, settings, processor)
    pixels = torch.randn(int(GRID.prod(-1).sum()), PATCH_VALUES, generator=torch.Generator().manual_seed(0))
    found = []
    for implementation in (vision_attention.NAME, "sdpa"):
        model = load_model(tmp_path, "float32", "cpu")
        assert model.config.vision_config._attn_implementation == vision_attention.NAME
        model.config.vision_config._attn_implementation = implementation
        states = model.model.visual(pixels, grid_thw=GRID).pooler_output
        states.square().sum().backward()
        found.append([states, *(one.grad for one in model.model.visual.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_attention_is_called_once_for_each_run_of_images_of_one_size(tmp_path, settings, processor, monkeypatch):
    SAVE["Qwen2VLForConditionalGeneration"](tmp_path, settings, processor)
    model = load_model(tmp_path, "float32", "cpu")
    shapes = []

    def counted(query, key, value, **options):
        shapes.append((query.shape[2], query.shape[0]))
        return functional.scaled_dot_product_attention(query, key, value, **options)

    monkeypatch.setattr(vision_attention, "scaled_dot_product_attention", counted)
    model.model.visual(torch.zeros(int(GRID.prod(-1).sum()), PATCH_VALUES), grid_thw=GRID)
    assert shapes == RUNS * len(model.model.visual.blocks)


def test_the_implementation_is_not_saved(tmp_path, settings, processor):
    SAVE["Qwen2VLForConditionalGeneration"](tmp_path, settings, processor)
    load_model(tmp_path, "float32", "cpu").save_pretrained(tmp_path / "saved")
    assert vision_attention.NAME not in (tmp_path / "saved" / "config.json").read_text()
