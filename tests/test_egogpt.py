"""EgoGPT: converted from its authors' layout, it computes what their code computes."""

import pytest
import torch
from egogpt_checkpoint import CASES, QUESTION, frames, kept, picture, save_original
from PIL import Image
from safetensors.torch import load_file
from conftest import ROOT

from firstsight.models.egogpt_conversion import convert
from firstsight.models.loading import load_model, load_processor
from firstsight.models import egogpt

EXPECTED = load_file(ROOT / "tests/data/egogpt.safetensors")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The tiny checkpoint, converted, once for each place that newlines can have."""
    folder = tmp_path_factory.mktemp("egogpt")
    for position in ("grid", "one_token"):
        save_original(folder / "original" / position, position)
        (folder / position).mkdir()
        convert(folder / "original" / position, folder / position)
    return folder


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_states_and_logits_are_those_of_the_authors_code(checkpoints, case):
    media, position = CASES[case]
    model, processor = load_model(checkpoints / position, "float32", "cpu"), load_processor(checkpoints / position)
    if isinstance(media, int):
        kind, pictures = "video", {"videos": [[Image.fromarray(frame.numpy()) for frame in frames(media)]]}
    else:
        kind, pictures = "image", {"images": [Image.fromarray(picture(*media).numpy())]}
    question = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(question, add_generation_prompt=True)
    inputs = processor(text=[text], return_tensors="pt", **pictures)
    states = model.model(**inputs).last_hidden_state[0]
    assert len(states) == EXPECTED[f"{case}.length"]
    print((states[kept(len(states))]- EXPECTED[f"{case}.states"]).abs().max())
    torch.testing.assert_close(states[kept(len(states))], EXPECTED[f"{case}.states"], atol=1e-4, rtol=0)
    torch.testing.assert_close(model.lm_head(states[-1]), EXPECTED[f"{case}.logits"], atol=1e-4, rtol=0)
