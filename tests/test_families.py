"""A LLaVA-OneVision teacher and a Qwen2-VL student: each with its own processor, template and image tokens."""

import json
from dataclasses import replace

import pytest
import torch
from alone import assert_packed_as_alone
from conftest import YAML_SAFE, change, make_sample, picture, run_stage, workspace, write_params
from families import SPECIAL_TOKENS, save_llava, tokenizer_like
from safetensors.torch import load_file

from firstsight.core.errors import UserError
from firstsight.distillation.vocabulary import shared_vocabulary
from firstsight.generation.answering import answers
from firstsight.loss.vocabulary import SharedVocabulary
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.packing.dataset import OnlineTeacher
from firstsight.packing.pack import collate, encode, pack
from firstsight.records.parquet import Split, SplitWriter

QUESTIONS = [("What is in your left hand?", "a red cup"), ("How many things are there?", "two"), ("Why?", "because")]


@pytest.fixture(scope="module")
def llava(processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    save_llava(folder, tokenizer_like(processor.tokenizer))
    return folder


SAMPLES = [
    make_sample("image", "image", 1, QUESTIONS),
    replace(make_sample("wide", "image", 1, QUESTIONS[:2]), frames=(picture(3, 112, 28),)),
    make_sample("frames", "frames", 3, QUESTIONS[:2]),
    make_sample("video", "video", 4, QUESTIONS),
    make_sample("text", "none", 0, QUESTIONS[:1]),
]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.id)
def test_packed_states_of_llava_equal_those_of_the_question_alone(llava, sample):
    assert_packed_as_alone(load_model(llava, "float32", "cpu"), load_processor(llava), SAMPLES, sample)


@pytest.fixture(scope="module")
def run(llava, tmp_path_factory):
    """A workspace with the LLaVA teacher from its folder, the smoke preset's student, and data of every kind."""
    folder = workspace(tmp_path_factory.mktemp("families"))
    document = YAML_SAFE.load(folder / "params.yaml")
    document["models"]["teacher"] = {"source": str(llava), "revision": None, "init": None}
    document["finetune_teacher"]["enabled"] = False
    write_params(folder, document)
    (folder / "data/egoqa").mkdir(parents=True)
    for split, seed in (("train", 0), ("validation", 100), ("test", 200)):
        with SplitWriter(folder / f"data/egoqa/{split}.parquet") as writer:
            for number in range(12):
                sample = SAMPLES[number % len(SAMPLES)]
                frames = tuple(picture(seed + number + n) for n in range(len(sample.frames)))
                records = tuple(replace(one, id=f"{split}-{number}-{one.id}") for one in sample.records)
                writer.write(replace(sample, id=f"{split}-{number}", frames=frames, records=records))
    for stage in (("download_models", "teacher"), ("download_models", "student"), ("finetune_teacher",)):
        run_stage(folder, *stage)
    return folder


@pytest.mark.system
def test_a_student_of_another_family_learns_from_cached_and_online_alike(run):
    weights = []
    for kind in ("hidden", "online"):
        change(run, "targets", kind=kind)
        change(run, "train", alpha=1.0, epochs=6, early_stopping_epochs=6, learning_rate=5e-3)
        run_stage(run, "cache_teacher_targets")
        run_stage(run, "distill")
        weights.append(load_file(run / "models/student-distilled/model.safetensors"))
        rows = json.loads((run / "models/student-distilled/history.json").read_text())
        divergences = [row["eval_divergence"] for row in rows if "eval_divergence" in row]
        assert divergences[-1] < 0.7 * divergences[0]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-4, rtol=1e-3)


@pytest.mark.system
def test_a_llava_teacher_is_evaluated(run):
    run_stage(run, "evaluate", "teacher")
    predictions = json.loads((run / "evaluations/teacher/predictions.json").read_text())
    model, processor = load_model(run / "models/teacher", "float32", "cpu"), load_processor(run / "models/teacher")
    questions = [(sample, record) for sample in Split(run / "data/egoqa/test.parquet") for record in sample.records]
    alone = [answer for one in questions[:8] for answer in answers(model, processor, [one], 1, 8)]
    assert [entry["answer"] for entry in predictions[:8]] == alone


def test_special_tokens_may_differ_and_text_may_not(processor):
    student = processor.tokenizer
    text = len(student) - len(student.added_tokens_decoder)
    llava = tokenizer_like(student)
    # <|endoftext|>, <|im_start|> and <|im_end|> come first in both.
    assert shared_vocabulary(llava, student) == SharedVocabulary(text + 3)
    another = tokenizer_like(student, ("<|im_end|>", "<|im_start|>", "<|endoftext|>"))
    assert shared_vocabulary(another, student) == SharedVocabulary(text, (text, text + 2))
    longer = tokenizer_like(student, SPECIAL_TOKENS)
    longer.add_tokens(["<|more|>"])
    assert shared_vocabulary(longer, student) == SharedVocabulary(text + 3)


@pytest.mark.system
def test_an_answer_that_tokenizes_differently_stops_the_run(run, llava, monkeypatch):
    change(run, "targets", kind="online")
    run_stage(run, "cache_teacher_targets")
    monkeypatch.setattr(OnlineTeacher, "answers", lambda self, sample, records: [[5, 6, 7]] * len(records))
    with pytest.raises(UserError, match=r"record train-0-image-0: expected .* where token 0 is 5 \('.'\), found"):
        run_stage(run, "distill")


def test_videos_of_different_lengths_are_refused_where_the_model_stacks_them(llava):
    processor = load_processor(llava)
    samples = [make_sample(str(n), "video", n, QUESTIONS[:1]) for n in (2, 3)]
    with pytest.raises(UserError, match=r"expected media of one shape in a batch, found .* needs batch_size: 1"):
        collate([pack(processor, s, encode(processor, s, s.records)) for s in samples], 0)
