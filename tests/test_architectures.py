"""Checkpoints of several architectures through one path: loading, quantizing, packing, asking."""

from dataclasses import replace

import hypothesis
import pytest
import torch
from alone import assert_packed_as_alone
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import make_sample, picture
from families import SAVE, save_qwen2
from hypothesis import strategies as st

from firstsight.acquisition.initialise import build_model
from firstsight.core.errors import UserError
from firstsight.generation.answering import answers
from firstsight.models.int4 import Int4Linear
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.models.quantized import language_model_prefix
from firstsight.packing.forward import last_hidden_states
from firstsight.packing.pack import collate, encode, pack
from firstsight.quantization.quantize import quantize_folder

QUESTIONS = [("What is in your left hand?", "a red cup"), ("How many things are there?", "two"), ("Why?", "because")]


@pytest.fixture(scope="module", params=SAVE, ids=list(SAVE))
def architecture(request, settings, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    SAVE[request.param](folder, settings, processor)
    return request.param, folder


def samples(name: str):
    kinds = {"none": 0} if name == "Qwen2ForCausalLM" else {"none": 0, "image": 1, "video": 4}
    return [make_sample(kind, kind, frames, QUESTIONS) for kind, frames in kinds.items()]


def test_an_architecture_loads(architecture):
    name, folder = architecture
    model = load_model(folder, "auto", "cpu")
    assert type(model).__name__ == name
    assert not model.training


@pytest.fixture(scope="module")
def loaded(architecture):
    _, folder = architecture
    return load_model(folder, "float32", "cpu"), load_processor(folder)


@hypothesis.settings(max_examples=15)
@hypothesis.given(st.data())
def test_packed_states_are_those_of_the_question_alone_at_every_rate(architecture, loaded, data):
    """In batches with media of other kinds, rates and shapes, as far as the architecture takes them."""
    name, _ = architecture
    kinds = ["none"] if name == "Qwen2ForCausalLM" else ["none", "image", "frames", "video"]
    # LLaVA-OneVision stacks videos.
    frames, size = (data.draw(st.sampled_from(one)) for one in ((2, 4, 6, 8), ((84, 84), (56, 112), (112, 28))))
    drawn = []
    for number, kind in enumerate(data.draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3))):
        count = {"none": 0, "image": 1, "frames": data.draw(st.integers(2, 3)), "video": frames}[kind]
        made = make_sample(f"{kind}-{number}", kind, 0, QUESTIONS[: data.draw(st.integers(1, 3))])
        pictures = tuple(picture(10 * number + n, *size) for n in range(count))
        rate = data.draw(st.sampled_from([0.5, 1.0, 3.3, 30.0]) | st.floats(0.05, 60)) if kind == "video" else 0.0
        drawn.append(replace(made, frames=pictures, fps=rate))
    for sample in drawn:
        assert_packed_as_alone(*loaded, drawn, sample)


@pytest.mark.parametrize(
    ("method", "kind", "bound"), [("int8", Linear8bitLt, 0.05), ("nf4", Linear4bit, 0.4), ("int4", Int4Linear, 0.4)]
)
@torch.inference_mode()
def test_a_quantized_load_keeps_sight_and_head_and_reloads_exactly(architecture, tmp_path, method, kind, bound):
    name, folder = architecture
    whole, model = load_model(folder, "float32", "cpu"), load_model(folder, method, "cpu")
    linear = {key: type(module) for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    inside = {key for key in linear if key.startswith(language_model_prefix(model))}
    assert {key for key, one in linear.items() if one is kind} == inside
    assert len(inside) == 2 * 7
    processor, asked = load_processor(folder), samples(name)
    batch = collate([pack(processor, one, encode(processor, one, one.records)) for one in asked], 0)
    expected, found = last_hidden_states(whole, batch), last_hidden_states(model, batch)
    assert (found - expected).norm() < bound * expected.norm()
    model.save_pretrained(tmp_path)
    reloaded = load_model(tmp_path, "auto", "cpu")
    before, after = model.state_dict(), reloaded.state_dict()
    assert before.keys() == after.keys()
    assert [key for key, value in before.items() if not torch.equal(after[key], value)] == []
    # INT8 rounds activations to 255 levels: rounding of 1e-6 before it may move one by a level, and the output by 1e-2.
    again = last_hidden_states(reloaded, batch)
    assert (again - found).norm() <= {"int8": 0.01, "nf4": 1e-6, "int4": 0}[method] * found.norm()


def test_an_architecture_answers_in_batches_as_alone(architecture):
    name, folder = architecture
    model, processor = load_model(folder, "auto", "cpu"), load_processor(folder)
    questions = [(sample, record) for sample in samples(name) for record in sample.records]
    together = list(answers(model, processor, questions, 4, 6))
    assert together == [one for question in questions for one in answers(model, processor, [question], 1, 6)]


def test_a_text_model_refuses_pictures(settings, processor, tmp_path):
    save_qwen2(tmp_path, settings, processor)
    sample = make_sample("image", "image", 1, QUESTIONS)
    with pytest.raises(UserError, match="expected records without media, because this model reads text alone"):
        encode(load_processor(tmp_path), sample, sample.records)


@pytest.mark.parametrize("method", ["nf4", "int4"])
@torch.inference_mode()
def test_a_16_bit_checkpoint_stays_so_beside_quantized_weights(settings, processor, tmp_path, method):
    source, target = tmp_path / "source", tmp_path / "target"
    for path in (source, target):
        path.mkdir()
    build_model(settings.models.teacher.init, processor.tokenizer).to(torch.bfloat16).save_pretrained(source)
    processor.save_pretrained(source)
    sample = make_sample("image", "image", 1, QUESTIONS)
    quantize_folder(source, target, method, settings.quantize, "cpu", [(sample, sample.records[0])])
    model = load_model(target, "auto", "cpu")
    assert model.model.visual.blocks[0].norm1.weight.dtype == torch.bfloat16
    assert len(list(answers(model, load_processor(target), [(sample, sample.records[0])], 1, 2))) == 1
