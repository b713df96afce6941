"""EgoGPT: converted from its authors' layout, it computes what their code computes, and goes where others go."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from alone import assert_packed_as_alone
from conftest import ROOT, YAML_SAFE, change, make_sample, picture, run_stage, workspace, write_params
from egogpt_checkpoint import CASES, QUESTION, kept, pictures, save_original
from PIL import Image
from safetensors.torch import load_file, save_file
from test_sources import write_video
from transformers import AutoModelForImageTextToText, Qwen2Tokenizer

from firstsight.acquisition.egogpt_conversion import convert, is_original
from firstsight.acquisition.initialise import SPECIAL_TOKENS, build_model, build_processor
from firstsight.core.errors import UserError
from firstsight.core.files import read_json
from firstsight.generation.answering import answers, model_inputs
from firstsight.models.egogpt import EgoGptConfig, EgoGptForConditionalGeneration
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.records.sample import SPLITS

EXPECTED = load_file(ROOT / "tests/data/egogpt.safetensors")
QUESTIONS = [("What is in your left hand?", "a red cup"), ("How many things are there?", "two"), ("Why?", "because")]
SAMPLES = [
    make_sample("image", "image", 1, QUESTIONS),
    make_sample("frames", "frames", 2, QUESTIONS[:2]),
    make_sample("video", "video", 2, QUESTIONS),
    make_sample("text", "none", 0, QUESTIONS[:2]),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The tiny checkpoint, converted, once for each place that newlines can have."""
    folder = tmp_path_factory.mktemp("egogpt")
    for position in ("grid", "one_token"):
        save_original(folder / "original" / position, position)
        (folder / position).mkdir()
        convert(folder / "original" / position, folder / position)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoints):
    return load_model(checkpoints / "grid", "float32", "cpu"), load_processor(checkpoints / "grid")


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_states_and_logits_are_those_of_the_authors_code(checkpoints, case):
    kind, sizes, position = CASES[case]
    model, processor = load_model(checkpoints / position, "float32", "cpu"), load_processor(checkpoints / position)
    images = [Image.fromarray(picture.numpy()) for picture in pictures(case)]
    media = {"videos": [images]} if kind == "video" else {"images": images}
    parts = [{"type": "video"}] if kind == "video" else [{"type": "image"} for _ in sizes]
    question = [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(question, add_generation_prompt=True)
    states = model.model(**processor(text=[prompt], return_tensors="pt", **media)).last_hidden_state[0]
    assert len(states) == EXPECTED[f"{case}.length"]
    torch.testing.assert_close(states[kept(len(states))], EXPECTED[f"{case}.states"], atol=1e-4, rtol=0)
    torch.testing.assert_close(model.lm_head(states[-1]), EXPECTED[f"{case}.logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.id)
def test_packed_states_equal_those_of_the_question_alone(loaded, sample):
    assert_packed_as_alone(*loaded, SAMPLES, sample)


def test_a_batch_is_answered_as_its_questions_alone(loaded):
    model, processor = loaded
    questions = [(sample, sample.records[0]) for sample in SAMPLES]
    alone = [answer for one in questions for answer in answers(model, processor, [one], 1, 6)]
    assert any(alone)
    assert list(answers(model, processor, questions, len(questions), 6)) == alone


def test_the_prompt_is_the_authors(loaded):
    _, processor = loaded
    texts = [model_inputs(processor, [(sample, sample.records[-1])], "cpu")["input_ids"][0] for sample in SAMPLES]
    written = [re.sub(r"(<\w+>)\1*", r"\1", processor.tokenizer.decode(text)) for text in texts]
    frame = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    assert written == [
        (frame + "<|im_start|>assistant\n").format(media + sample.records[-1].prompt())
        for sample, media in zip(
            SAMPLES,
            ("<image>\n<speech>\n\n", "<image>\n<image>\n<speech>\n\n", "<video>\n<speech>\n\n", ""),
            strict=True,
        )
    ]


def test_it_saves_and_loads_as_any_model(loaded, tmp_path):
    model, processor = loaded
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reread = load_model(tmp_path, "float32", "cpu"), load_processor(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for sample in SAMPLES:
        question = [(sample, sample.records[0])]
        inputs, expected = model_inputs(reread, question, "cpu"), model_inputs(processor, question, "cpu")
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_the_true_model_has_as_many_parameters_as_its_parts():
    text = {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944}
    heads = {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    with torch.device("meta"):
        model = EgoGptForConditionalGeneration(EgoGptConfig(text_config=text | heads))
    parts = {
        "language": [model.model.language_model, model.lm_head],
        "vision": [model.model.vision_tower],
        "projector": [model.model.multi_modal_projector],
    }
    counts = {name: sum(p.numel() for one in modules for p in one.parameters()) for name, modules in parts.items()}
    assert counts == {"language": 7_615_616_512, "vision": 397_747_744, "projector": 16_980_992}
    assert model.model.image_newline.numel() == 3_584
    assert model.model.silence.numel() == 300 * 3_584
    assert sum(p.numel() for p in model.parameters()) == 8_031_424_032


def test_one_file_in_bfloat16_and_a_grid_given_as_a_range_are_converted_alike(checkpoints, loaded, tmp_path):
    source, folder = tmp_path / "source", tmp_path / "converted"
    save_original(source)
    weights = {}
    for path in sorted(source.glob("*.safetensors*")):
        weights |= {} if path.suffix == ".json" else load_file(path)
        path.unlink()
    save_file({name: value.bfloat16() for name, value in weights.items()}, source / "model.safetensors")
    change_config(source, image_grid_pinpoints="(1x1),...,(6x6)")
    folder.mkdir()
    convert(source, folder)
    model, processor = load_model(folder, "float32", "cpu"), load_processor(folder)
    assert processor.image_processor.image_grid_pinpoints == loaded[1].image_processor.image_grid_pinpoints
    for name, value in loaded[0].state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=0.02, rtol=0.02)
    kept = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    assert kept.lm_head.weight.dtype == torch.bfloat16
    # What config.json says decides how it is planned, and in what it is saved after it has been trained.
    assert read_json(folder / "config.json", "convert")["dtype"] == "bfloat16"


def change_config(source, **values):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | values))


def change_weights(source, change):
    path = source / "model-00002-of-00002.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def refuse_no_weights(source):
    for path in source.glob("*.safetensors"):
        path.unlink()
    return r"expected weights in \*\.safetensors, found none"


def refuse_broken_file(source):
    (source / "model-00002-of-00002.safetensors").write_bytes(b"\x08\x00")
    return "found a broken file"


def refuse_no_tokenizer(source):
    (source / "vocab.json").unlink()
    return "found a broken file"


def refuse_missing_setting(source):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "rope_theta"}))
    return r"config\.json: expected rope_theta, found none"


def refuse_no_size(source):
    change_config(source, hidden_size=None)
    return r"config\.json: hidden_size: expected a whole number above 0, found None"


def refuse_no_heads(source):
    change_config(source, num_attention_heads=0)
    return r"num_attention_heads: expected a whole number above 0, found 0"


def refuse_heads_that_do_not_fit(source):
    change_config(source, num_attention_heads=5)
    return r"hidden_size: expected a multiple of 5 heads, found 64"


def refuse_no_rate(source):
    change_config(source, speech_encoder_ds_rate=0)
    return r"speech_encoder_ds_rate: expected a whole number above 0, found 0"


def refuse_a_grid_of_numbers(source):
    change_config(source, image_grid_pinpoints=[1, 2])
    return r"image_grid_pinpoints: expected a list of resolutions or a range of tiles, found \[1, 2\]"


def refuse_other_positions(source):
    change_config(source, rope_scaling={"type": "yarn", "factor": 4.0})
    return r"rope_scaling: expected None, found \{'type': 'yarn', 'factor': 4\.0\}"


def refuse_missing_weight(source):
    change_weights(source, lambda weights: weights.popitem())
    return "expected a weight for .*, found none"


def refuse_missing_speech(source):
    change_weights(source, lambda weights: [weights.pop(name) for name in list(weights) if "speech_enc" in name])
    return r"expected a weight for speech\.encoder"


def refuse_unexpected_weight(source):
    change_weights(source, lambda weights: weights.update({"model.faster_token": torch.zeros(64)}))
    return r"expected EgoGPT's weights alone, found model\.faster_token and 0 more"


def refuse_another_shape(source):
    change_config(source, intermediate_size=100)
    return r"expected the shape \[.*100.*\] that config\.json gives, found \[.*96.*\]"


def refuse_another_layout(source):
    change_config(source, mm_newline_position="frame")
    return "mm_newline_position: expected 'grid' or 'one_token', found 'frame'"


def refuse_another_grid(source):
    change_config(source, image_grid_pinpoints=None)
    return "image_grid_pinpoints: expected a list of resolutions or a range of tiles, found None"


def refuse_a_full_vocabulary(source):
    change_config(source, vocab_size=263)
    return "expected at least 264 rows of embeddings, three of them for the tokens that mark media, found 263"


@pytest.mark.parametrize(
    "damage",
    [
        refuse_no_weights,
        refuse_broken_file,
        refuse_no_tokenizer,
        refuse_missing_setting,
        refuse_no_size,
        refuse_no_heads,
        refuse_heads_that_do_not_fit,
        refuse_no_rate,
        refuse_a_grid_of_numbers,
        refuse_other_positions,
        refuse_missing_weight,
        refuse_missing_speech,
        refuse_unexpected_weight,
        refuse_another_shape,
        refuse_another_layout,
        refuse_another_grid,
        refuse_a_full_vocabulary,
    ],
)
def test_a_checkpoint_that_is_not_egogpts_is_refused_before_anything_is_written(tmp_path, damage):
    source, folder = tmp_path / "source", tmp_path / "converted"
    save_original(source)
    expected = damage(source)
    folder.mkdir()
    with pytest.raises(UserError, match=f"^lmms-lab/EgoGPT: .*{expected}") as error:
        convert(source, folder, "lmms-lab/EgoGPT")
    assert "\n" not in str(error.value)
    assert not list(folder.iterdir())


def test_the_stage_converts_what_is_original_and_nothing_else(checkpoints, tmp_path):
    folder = workspace(tmp_path / "workspace")
    original = Path(shutil.copytree(checkpoints / "original/grid", tmp_path / "original"))
    (original / "README.md").write_text("---\nlicense: apache-2.0\n---\n# EgoGPT\n")
    (original / "LICENSE").write_text("Apache License 2.0")
    before = sorted(path.name for path in original.iterdir())
    for source in (original, checkpoints / "grid"):
        document = YAML_SAFE.load(folder / "params.yaml")
        document["models"]["teacher"] = {"source": str(source), "revision": None, "init": None}
        write_params(folder, document)
        run_stage(folder, "download_models", "teacher")
        assert is_original(source / "config.json") == (source == original)
        files = {path.name for path in (folder / "models/teacher").iterdir()}
        card = {"README.md", "LICENSE"} if source == original else set()
        assert files == {path.name for path in (checkpoints / "grid").iterdir()} | card | {"source.json"}
        origin = read_json(folder / "models/teacher/source.json", "download-models")
        assert origin["licence"] == ("apache-2.0" if card else None)
        load_model(folder / "models/teacher", "float32", "cpu")
    assert sorted(path.name for path in original.iterdir()) == before
    assert [path.name for path in (folder / "models").iterdir()] == ["teacher"]


def save_student(original: Path, settings, folder: Path) -> None:
    """A tiny Qwen2-VL over EgoGPT's tokens, with the special ones that Qwen2-VL has beside them."""
    merges = [tuple(line.split(" ")) for line in (original / "merges.txt").read_text().splitlines()[1:]]
    vocabulary = list(json.loads((original / "vocab.json").read_text()))
    tokenizer = Qwen2Tokenizer(
        vocab={token: place for place, token in enumerate([*vocabulary, *SPECIAL_TOKENS])},
        merges=merges,
        extra_special_tokens=list(SPECIAL_TOKENS),
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
    )
    torch.manual_seed(0)
    build_model(settings.models.student.init, tokenizer).save_pretrained(folder)
    build_processor(tokenizer, 12544).save_pretrained(folder)


@pytest.mark.system
def test_it_teaches_a_qwen2_vl_through_the_stages(checkpoints, settings, tmp_path):
    """Images and videos, from the authors' files to a distilled student; cached or beside it, the same student."""
    folder = workspace(tmp_path / "workspace")
    original = checkpoints / "original/grid"
    save_student(original, settings, tmp_path / "student")
    values = YAML_SAFE.load(folder / "params.yaml")
    for role, source in (("teacher", original), ("student", tmp_path / "student")):
        values["models"][role] = {"source": str(source), "revision": None, "init": None}
    write_params(folder, values)
    lines = []
    for number, split in enumerate(SPLITS):
        (folder / f"{split}.jpg").write_bytes(picture(number))
        write_video(folder / f"{split}.mp4", frames=20 + 10 * number)
        for media in (f"{split}.jpg", f"{split}.mp4"):
            lines.append({"media": media, "question": "What is it?", "answer": f"a cup {number}", "split": split})
    (folder / "qa.jsonl").write_text("\n".join(map(json.dumps, lines)))
    change(folder, "data", source="jsonl", path="qa.jsonl", max_frames=4)
    change(folder, "finetune_teacher", enabled=False)
    for stage in (
        ("download_models", "teacher"),
        ("download_models", "student"),
        ("build_egoqa_dataset",),
        ("finetune_teacher",),
    ):
        run_stage(folder, *stage)
    weights = {}
    for kind in ("hidden", "online"):
        change(folder, "targets", kind=kind, batch_size=1)
        change(folder, "train", batch_size=1, gradient_accumulation_steps=2)
        for stage in ("cache_teacher_targets", "distill"):
            run_stage(folder, stage)
        weights[kind] = load_file(folder / "models/student-distilled/model.safetensors")
    before = load_file(folder / "models/student/model.safetensors")
    for name, expected in weights["hidden"].items():
        torch.testing.assert_close(weights["online"][name], expected, atol=1e-5, rtol=1e-4)
    assert any(not before[name].equal(expected) for name, expected in weights["hidden"].items())
    for variant in ("teacher", "student-distilled"):
        run_stage(folder, "evaluate", variant)
        assert len(read_json(folder / f"evaluations/{variant}/predictions.json", "evaluate")) == 2
