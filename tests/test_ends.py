"""Models that end their answers with different tokens, taught by each other: the loss, and whole runs."""

import json

import pytest
import torch
from conftest import STAGES, change, exchange_tokens, run_stage
from safetensors.torch import load_file
from text_families import ANSWERS, TEXT_SAVE, text_workspace, write_split

from firstsight.core.errors import UserError
from firstsight.distillation.vocabulary import shared_vocabulary
from firstsight.loss.distillation_loss import distillation_loss
from firstsight.loss.teachers import HiddenTeacher
from firstsight.loss.vocabulary import SharedVocabulary
from firstsight.models.processors import load_processor

COMMON, TEACHER_ROWS, STUDENT_ROWS = 20, 26, 25
# What the teacher's and the student's end token are, and then the pairs of tokens that mean the same.
PLAIN = [(index, index) for index in range(COMMON)]
ENDS = {
    None: PLAIN,
    (20, 20): [*PLAIN, (20, 20)],
    (21, 21): [*PLAIN, (21, 21)],
    (20, 23): [*PLAIN, (20, 23)],
    (24, 22): [*PLAIN, (24, 22)],
    # One end is a common token, which the other model never uses.
    (25, 7): [pair for pair in PLAIN if pair != (7, 7)] + [(25, 7)],
    (7, 22): [pair for pair in PLAIN if pair != (7, 7)] + [(7, 22)],
    (3, 7): [pair for pair in PLAIN if pair not in ((3, 3), (7, 7))] + [(3, 7), (7, 3)],
}


@pytest.mark.parametrize(("ends", "pairs"), ENDS.items(), ids=str)
def test_ends_that_differ_are_one_token_to_the_loss(ends, pairs):
    random = torch.Generator().manual_seed(0)
    hidden, head, teacher_hidden, teacher_head = (
        torch.randn(shape, generator=random, dtype=torch.float64)
        for shape in ((9, 6), (STUDENT_ROWS, 6), (9, 8), (TEACHER_ROWS, 8))
    )
    answers = torch.tensor([0, 3, 7, 20, 21, 22, 23, 24, 5])
    hidden.requires_grad_()
    head.requires_grad_()
    vocabulary = SharedVocabulary(COMMON, ends)
    assert vocabulary.size == len(pairs)
    loss = distillation_loss(
        hidden,
        head,
        answers,
        HiddenTeacher(teacher_hidden, vocabulary.of_teacher(teacher_head)),
        shared_vocabulary=vocabulary.size,
        temperature=2.0,
        alpha=0.7,
        exchanged=vocabulary.exchanged,
    )
    of_teacher, of_student = (list(one) for one in zip(*pairs, strict=True))
    logits = hidden @ head.T
    log_p = ((teacher_hidden @ teacher_head.T)[:, of_teacher] / 2).log_softmax(-1)
    log_q = (logits[:, of_student] / 2).log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum()
    expected = 0.7 * 4 * divergence + 0.3 * torch.nn.functional.cross_entropy(logits, answers, reduction="sum")
    torch.testing.assert_close(loss.total, expected)
    for found, wanted in zip(
        torch.autograd.grad(loss.total, (hidden, head)), torch.autograd.grad(expected, (hidden, head)), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_the_ends_of_the_pairs_that_are_named_most(settings, processor, tmp_path):
    tokenizers = {}
    for name, save in TEXT_SAVE.items():
        (folder := tmp_path / name).mkdir()
        save(folder, settings, processor)
        tokenizers[name] = load_processor(folder).tokenizer
    text = tokenizers["deepseek"].eos_token_id  # which follows the text tokens
    instruct, base, deepseek = (tokenizers[name] for name in ("qwen2-instruct", "qwen2-base", "deepseek"))
    assert shared_vocabulary(instruct, instruct) == SharedVocabulary(text + 3)
    assert shared_vocabulary(deepseek, base) == SharedVocabulary(text, (text, text))
    assert shared_vocabulary(deepseek, instruct) == SharedVocabulary(text, (text, text + 2))
    assert shared_vocabulary(base, instruct) == SharedVocabulary(text + 3, (text, text + 2))


def test_inputs_that_fit_leave_the_same_note_every_time(settings, processor, tmp_path):
    folder = text_workspace(tmp_path, settings, processor, "deepseek", "qwen2-instruct")
    run_stage(folder, "check_inputs")
    first = (folder / "data/checked.json").read_text()
    change(folder, "targets", max_answer_tokens=3)
    run_stage(folder, "check_inputs")
    assert (folder / "data/checked.json").read_text() == first


def too_long(folder):
    write_split(folder, "validation", [("Why? " * 60, "because")])
    return r"record validation-0-0: expected at most 96 tokens, as many as models/teacher has positions for, found 248"


def no_room_for_an_answer_of_the_teacher(folder):
    write_split(folder, "train", [("Why? " * 20, "")])
    change(folder, "targets", max_answer_tokens=90)
    return r"record train-0-0: expected at most 96 tokens, as many as models/teacher has positions for, found 1\d+"


def another_vocabulary(folder):
    exchange_tokens(folder / "models/teacher")
    return "models.student: expected the teacher's vocabulary, where token 300 is"


def another_split_into_words(folder):
    """The same tokens, and other tokens of an answer."""
    path = folder / "models/teacher/tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["merges"] = []
    path.write_text(json.dumps(values))
    write_split(folder, "train", [("Why?", "because")])
    return r"record train-0-0: expected the teacher's answer tokens, where token 0 is \d+ .*, found"


def images(folder):
    write_split(folder, "test", [("Why?", "because")], "image")
    return "expected records without media, because this model reads text alone"


@pytest.mark.parametrize("break_it", [too_long, no_room_for_an_answer_of_the_teacher, another_vocabulary,
                                      another_split_into_words, images])  # fmt: skip
def test_inputs_that_do_not_fit_are_one_line_before_anything_is_trained(settings, processor, tmp_path, break_it):
    folder = text_workspace(tmp_path, settings, processor, "gpt2", "gpt2")
    found = break_it(folder)
    with pytest.raises(UserError, match=found) as error:
        run_stage(folder, "check_inputs")
    assert "\n" not in str(error.value)
    assert not (folder / "data/checked.json").exists()


def test_a_question_too_long_to_answer_stops_the_evaluation_before_it_begins(settings, processor, tmp_path):
    folder = text_workspace(tmp_path, settings, processor, "gpt2", "gpt2")
    change(folder, "evaluate", max_new_tokens=90)
    with pytest.raises(UserError, match="record test-0-0: expected at most 96 tokens, as many as models/student has"):
        run_stage(folder, "evaluate", "student")
    assert not (folder / "evaluations/student").exists()


@pytest.mark.system
@pytest.mark.parametrize(
    ("teacher", "student"),
    [("deepseek", "qwen2-instruct"), ("deepseek", "qwen2-base"), ("qwen2-base", "qwen2-instruct"), ("gpt2", "gpt2")],
)
def test_a_student_learns_answers_and_their_end_from_the_teacher_alone(settings, processor, tmp_path, teacher, student):
    """At alpha 1 nothing but the teacher says where an answer ends; by cached, top-k and online targets alike."""
    folder = text_workspace(tmp_path, settings, processor, teacher, student)
    change(folder, "finetune_teacher", epochs=30, learning_rate=5e-3)
    change(folder, "train", epochs=40, early_stopping_epochs=40)
    run_stage(folder, "finetune_teacher")
    weights = []
    for kind in ("hidden", "online", "topk"):
        change(folder, "targets", kind=kind, k=10_000)
        run_stage(folder, "cache_teacher_targets")
        run_stage(folder, "distill")
        weights.append(load_file(folder / "models/student-distilled/model.safetensors"))
    for other in weights[1:]:
        for name, weight in weights[0].items():
            torch.testing.assert_close(other[name], weight, atol=1e-3, rtol=1e-2)
    run_stage(folder, "evaluate", "student-distilled")
    found = [
        one["answer"] for one in json.loads((folder / "evaluations/student-distilled/predictions.json").read_text())
    ]
    assert found == [ANSWERS[number % 4] for number in range(12)]


@pytest.mark.system
@pytest.mark.parametrize("name", ["gpt2", "qwen2-base"])
def test_a_language_model_goes_through_every_stage(settings, processor, tmp_path, name):
    folder = text_workspace(tmp_path, settings, processor, name, name)
    rows = [{"question": f"What is at place {n}?", "answer": ANSWERS[n % 4], "group": str(n)} for n in range(40)]
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    change(folder, "data", source="jsonl", path="qa.jsonl", validation_fraction=0.2, test_fraction=0.2)
    adapter = {"rank": 4, "lora_alpha": 8.0, "dropout": 0.0, "target_modules": None}
    change(folder, "finetune_teacher", method="lora", adapter=adapter)
    change(folder, "train", method="lora", adapter=adapter, epochs=2, early_stopping_epochs=2)
    change(folder, "control", enabled=True)
    change(folder, "quantize", methods=["int8", "nf4"])
    for stage in STAGES[2:]:
        run_stage(folder, *stage)
    quality = json.loads((folder / "metrics/quality.json").read_text())
    assert {"teacher", "student-finetuned", "student-distilled", "student-int8", "student-nf4"} <= set(quality)
    assert (folder / "metrics/plots/quantization.png").exists()
