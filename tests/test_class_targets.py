"""Scores of classes: packed as alone, for any tokenizer, and the loss and the stages over them."""

import json

import pytest
import torch
from conftest import change, exchange_tokens, make_sample, run_stage
from safetensors.torch import load_file, save_file
from text_families import TEXT_SAVE, text_workspace

from firstsight.core import params
from firstsight.core.errors import UserError
from firstsight.distillation import builder
from firstsight.distillation.targets import Shards
from firstsight.loss.distillation_loss import distillation_loss
from firstsight.loss.teachers import HiddenTeacher
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.packing import forward as scoring
from firstsight.packing.dataset import ClassDataset
from firstsight.packing.forward import class_scores, normalisation
from firstsight.packing.pack import IGNORE
from firstsight.records.parquet import Split, SplitWriter
from firstsight.reporting.summary import training_summary

CLASSES = ("a red cup", "two", "in your left hand")
QUESTIONS = {
    "one": [("What is on the table?", "two")],
    "three": [("What is it?", "a red cup"), ("Where is the ball?", ""), ("How many?", "two")],
}


def write_classes(path, questions=QUESTIONS, classes=CLASSES, content_free=()):
    with SplitWriter(path, classes, content_free=content_free) as writer:
        for name, asked in questions.items():
            writer.write(make_sample(name, "none", 0, asked))
    return Split(path)


def alone(model, processor, question: str, wording: str) -> torch.Tensor:
    """The log-probability of a wording and its end after the prompt, by the model's own logits, of one sequence."""
    turn = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    asked, answer = (
        processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        for text in (prompt, wording + processor.tokenizer.eos_token)
    )
    logits = model(torch.cat([asked, answer], 1)).logits[0, asked.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(-1, answer[0][:, None]).sum()


def scores_of(folder, split, precision="float32"):
    model, dataset = load_model(folder, precision, "cpu"), ClassDataset(split, load_processor(folder))
    return class_scores(model, dataset.collate([dataset[number] for number in range(len(dataset))]), len(CLASSES))


@pytest.mark.parametrize("name", TEXT_SAVE)
@torch.inference_mode()
def test_packed_classes_are_scored_as_each_alone(language_models, tmp_path, monkeypatch, name):
    monkeypatch.setitem(scoring._CHUNK, "cpu", 7)  # several chunks
    split = write_classes(tmp_path / "train.parquet")
    found = scores_of(language_models[name], split)
    model, processor = load_model(language_models[name], "float32", "cpu"), load_processor(language_models[name])
    expected = [
        [alone(model, processor, question, wording) for wording in CLASSES]
        for asked in QUESTIONS.values()
        for question, _ in asked
    ]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert found.dtype == torch.float32


def test_the_gradient_of_scores_is_that_of_each_alone(language_models, tmp_path, monkeypatch):
    monkeypatch.setitem(scoring._CHUNK, "cpu", 7)
    split = write_classes(tmp_path / "train.parquet")
    model, processor = load_model(language_models["gpt2"], "float32", "cpu"), load_processor(language_models["gpt2"])
    weights = torch.randn(4, len(CLASSES), generator=torch.Generator().manual_seed(0))
    dataset = ClassDataset(split, processor)
    packed = class_scores(model, dataset.collate([dataset[0], dataset[1]]), len(CLASSES))
    questions = [question for asked in QUESTIONS.values() for question, _ in asked]
    each = torch.stack([torch.stack([alone(model, processor, one, name) for name in CLASSES]) for one in questions])
    layers = (model.transformer.wte.weight, model.transformer.h[0].attn.c_attn.weight)
    found, expected = (torch.autograd.grad((scores * weights).sum(), layers) for scores in (packed, each))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_padding_samples_have_no_scores(language_models, tmp_path):
    split = write_classes(tmp_path / "train.parquet")
    dataset = ClassDataset(split, load_processor(language_models["gpt2"])).padded_to_multiple(4)
    assert len(dataset) == 4
    batch = dataset.collate([dataset[number] for number in range(4)])
    assert batch["labels"].tolist() == [[1, IGNORE, IGNORE], [0, IGNORE, 1], [IGNORE] * 3, [IGNORE] * 3]
    model = load_model(language_models["gpt2"], "float32", "cpu")
    assert class_scores(model, batch, len(CLASSES)).shape == (4, 3)
    nothing = class_scores(model, dataset.collate([dataset[2]]), len(CLASSES))
    assert nothing.shape == (0, 3)
    nothing.sum().backward()


@torch.inference_mode()
def test_two_tokenizers_give_the_same_scores(language_models, tmp_path):
    """The same weights under other numbers: no token is compared, so that the numbers do not matter."""
    split = write_classes(tmp_path / "train.parquet")
    other = tmp_path / "other"
    other.mkdir()
    for path in language_models["gpt2"].iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    exchange_tokens(other)
    weights = load_file(other / "model.safetensors")
    weights["wte.weight"][[300, 301]] = weights["wte.weight"][[301, 300]].clone()
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(scores_of(other, split), scores_of(language_models["gpt2"], split), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_samples_are_scored_by_length_and_written_in_the_order_of_the_split(
    language_models, tmp_path, settings, monkeypatch
):
    monkeypatch.setattr(builder, "_WINDOW", 2)
    ways = [7 * number % 11 for number in range(10)]
    asked = {f"{n}": [(f"Where is {'very ' * way}place {n}?", "two" if n % 2 else "")] for n, way in enumerate(ways)}
    asked["4"] *= 2
    split, batches = write_classes(tmp_path / "train.parquet", asked), []

    def noted(model, batch, classes):
        batches.append((batch["segment_ids"] >= 0).sum(1).tolist())
        return class_scores(model, batch, classes)

    monkeypatch.setattr(builder, "class_scores", noted)
    folder = language_models["gpt2"]
    model, dataset = load_model(folder, "float32", "cpu"), ClassDataset(split, load_processor(folder))
    wanted = settings.targets.model_copy(update={"batch_size": 3})
    answers = builder.write_class_targets(model, dataset, "train", wanted, tmp_path, 0)
    # Windows of six samples and of four, the longer ones of each first.
    assert [len(lengths) for lengths in batches] == [3, 3, 3, 1]
    for first, second in (batches[:2], batches[2:]):
        assert min(first) >= max(second)
    written = Shards(tmp_path, "train")
    assert len(written) == 11
    for number in range(len(split)):
        expected = class_scores(model, dataset.collate([dataset[number]]), len(CLASSES))
        found = written.rows(dataset.records(number))["hidden"]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        best = [CLASSES[scores.argmax()] for scores in expected]
        assert all(answers.get(one.id, best[0]) == best[0] for one in split[number].records)
    assert set(answers) == {one.id for sample in split for one in sample.records if not one.answer}


CONTENT_FREE = ("N/A?", "What is [MASK]?")


@pytest.mark.parametrize("name", ["gpt2", "deepseek"])
@torch.inference_mode()
def test_scores_are_normalised_by_length_and_by_the_prior_of_a_wording(language_models, tmp_path, name):
    split = write_classes(tmp_path / "train.parquet", content_free=CONTENT_FREE)
    model, processor = load_model(language_models[name], "float32", "cpu"), load_processor(language_models[name])
    sums = scores_of(language_models[name], split)
    ended = [wording + processor.tokenizer.eos_token for wording in CLASSES]
    lengths = [len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ended]
    assert len(set(lengths)) > 1
    behind = [[alone(model, processor, question, wording) for wording in CLASSES] for question in CONTENT_FREE]
    prior = torch.tensor(behind).softmax(-1).mean(0).log()
    expected = {"sum": sums, "mean": sums / torch.tensor(lengths), "calibrated": sums - prior}
    assert not expected["calibrated"].argmax(-1).equal(sums.argmax(-1))
    for kind, scores in expected.items():
        found = normalisation(kind, model, processor, split)(sums)
        torch.testing.assert_close(found, scores, atol=1e-5, rtol=1e-5)


def test_data_without_content_free_questions_do_not_calibrate(language_models, tmp_path):
    split = write_classes(tmp_path / "train.parquet")
    model, processor = load_model(language_models["gpt2"], "float32", "cpu"), load_processor(language_models["gpt2"])
    with pytest.raises(
        UserError, match=r"expected questions without content, .*run build-egoqa-dataset again"
    ) as error:
        normalisation("calibrated", model, processor, split)
    assert "\n" not in str(error.value)


def loss_over(scores, teacher, answers, temperature, alpha):
    identity = torch.eye(scores.shape[1], dtype=scores.dtype)
    return distillation_loss(
        scores,
        identity,
        answers,
        teacher and HiddenTeacher(teacher[0], identity) if alpha else None,
        shared_vocabulary=scores.shape[1],
        temperature=temperature,
        alpha=alpha,
    ).total


def test_at_low_temperature_the_teachers_best_class_is_what_is_learnt():
    random = torch.Generator().manual_seed(0)
    scores, teacher = (torch.randn(9, 5, generator=random, dtype=torch.float64) for _ in range(2))
    scores.requires_grad_()
    temperature = 0.01
    (found,) = torch.autograd.grad(loss_over(scores, [teacher], torch.zeros(9, dtype=int), temperature, 1.0), scores)
    hard = torch.nn.functional.cross_entropy(scores / temperature, teacher.argmax(-1), reduction="sum")
    (expected,) = torch.autograd.grad(temperature**2 * hard, scores)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


@pytest.fixture
def over_classes(settings, processor, tmp_path):
    """A workspace whose teacher and student have different tokenizers, with records of classes."""
    folder = text_workspace(tmp_path / "run", settings, processor, "gpt2", "qwen2-instruct")
    exchange_tokens(folder / "models/teacher")
    change(folder, "data", source="csv", classes=list(CLASSES), prompt="{text}")
    change(folder, "targets", over="classes", batch_size=2)
    change(folder, "finetune_teacher", enabled=False)
    change(folder, "train", alpha=0.7, temperature=3.0, epochs=2)
    change(folder, "control", enabled=True)
    wordings = [*CLASSES, ""]
    for split in ("train", "validation", "test"):
        asked = {
            f"{split}-{n}": [(f"What is at place {n % 4}?", wordings[n % (3 if split == "test" else 4)])]
            for n in range(12)
        }
        write_classes(folder / f"data/egoqa/{split}.parquet", asked, content_free=CONTENT_FREE)
    return folder


def test_vocabularies_are_not_compared_over_classes(over_classes):
    run_stage(over_classes, "check_inputs")
    change(over_classes, "targets", over="tokens")
    with pytest.raises(UserError, match="expected the teacher's vocabulary"):
        run_stage(over_classes, "check_inputs")


def test_a_wording_for_which_a_model_has_no_position_is_named(over_classes):
    write_classes(over_classes / "data/egoqa/test.parquet", {"long": [("Why? " * 43, "two")]}, (*CLASSES, "so " * 30))
    with pytest.raises(UserError, match="record long-0: expected at most 96 tokens, as many as models/teacher has pos"):
        run_stage(over_classes, "check_inputs")
    change(over_classes, "targets", class_scores="calibrated")
    write_classes(over_classes / "data/egoqa/train.parquet", content_free=("Why? " * 43,))
    with pytest.raises(UserError, match=r"record content-free question 'Why.*: expected at most 96 tokens, as many as"):
        run_stage(over_classes, "check_inputs")


@pytest.mark.system
def test_a_student_of_another_tokenizer_learns_the_teachers_classes(over_classes):
    for stage in ("finetune_teacher", "cache_teacher_targets"):
        run_stage(over_classes, stage)
    targets = over_classes / "data/teacher-targets"
    index = json.loads((targets / "index.json").read_text())
    assert (index["classes"], index["bytes_per_token"]) == (list(CLASSES), 12)
    assert index["answer_tokens"] == {"train": 12, "validation": 12}
    split = Split(over_classes / "data/egoqa/train.parquet")
    with torch.inference_mode():
        scores = scores_of(over_classes / "models/teacher", split)
    stored = load_file(targets / "train-00000.safetensors")
    torch.testing.assert_close(stored["hidden"], scores, atol=1e-4, rtol=1e-5)
    answers = json.loads((targets / "answers.json").read_text())
    unanswered = [number for number in range(12) if number % 4 == 3]
    assert answers == answers | {f"train-{n}-0": CLASSES[int(scores[n].argmax())] for n in unanswered}
    assert len(answers) == 6
    for stage in ("distill", "finetune_student"):
        run_stage(over_classes, stage)
    history = json.loads((over_classes / "models/student-distilled/history.json").read_text())
    evaluated = [row for row in history if "eval_objective" in row]
    # Over three classes, where an untrained student is not far from chance.
    assert all(row["eval_ce"] < 6 and 0 <= row["eval_agreement"] <= 1 for row in evaluated)
    parts = evaluated[0]
    expected = 0.7 * 9 * parts["eval_divergence"] + 0.3 * parts["eval_ce"]
    assert parts["eval_objective"] == pytest.approx(expected, rel=1e-4)
    control = json.loads((over_classes / "models/student-finetuned/history.json").read_text())
    assert "eval_divergence" not in str(control)


@pytest.mark.system
def test_the_teacher_alone_is_calibrated_where_it_is_cached_and_where_it_is_evaluated(over_classes):
    change(over_classes, "targets", class_scores="calibrated")
    change(over_classes, "evaluate", teacher_methods=["int8"], latency_runs=1, throughput_batch_sizes=[1])
    for stage in ("finetune_teacher", "cache_teacher_targets"):
        run_stage(over_classes, stage)
    folders = {name: over_classes / f"models/{name}" for name in ("teacher", "student")}
    train, test = (Split(over_classes / f"data/egoqa/{name}.parquet") for name in ("train", "test"))

    @torch.inference_mode()
    def normalised(kind, name, split, precision="float32"):
        model, processor = load_model(folders[name], precision, "cpu"), load_processor(folders[name])
        return normalisation(kind, model, processor, split)(scores_of(folders[name], split, precision))

    stored = load_file(over_classes / "data/teacher-targets/train-00000.safetensors")["hidden"]
    torch.testing.assert_close(stored, normalised("calibrated", "teacher", train), atol=1e-4, rtol=1e-5)
    for variant, kind, precision in (
        ("teacher", "calibrated", "float32"),
        ("teacher-int8", "calibrated", "int8"),
        ("student", "sum", "float32"),
    ):
        run_stage(over_classes, "evaluate", variant)
        rows = json.loads((over_classes / f"evaluations/{variant}/predictions.json").read_text())
        best = normalised(kind, variant.partition("-")[0], test, precision).softmax(-1).max(-1)
        assert [row["answer"] for row in rows] == [CLASSES[number] for number in best.indices]
        assert [row["confidence"] for row in rows] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.system
def test_the_weights_of_the_last_step_are_kept_beside_those_of_the_most_accurate_epoch(over_classes):
    """Far too fast: of eight epochs, the last is not the best."""
    change(over_classes, "train", epochs=8, early_stopping_epochs=8, best="accuracy", keep_final=True, alpha=0.0)
    change(over_classes, "train", learning_rate=0.05, batch_size=2)
    for stage in ("finetune_teacher", "cache_teacher_targets", "distill"):
        run_stage(over_classes, stage)
    output = over_classes / "models/student-distilled"
    rows = [row for row in json.loads((output / "history.json").read_text()) if "eval_accuracy" in row]
    split = Split(over_classes / "data/egoqa/validation.parquet").answered(
        json.loads((over_classes / "data/teacher-targets/answers.json").read_text())
    )

    @torch.inference_mode()
    def accuracy(folder):
        right = [CLASSES.index(record.answer) for sample in split for record in sample.records]
        return (scores_of(folder, split).argmax(-1) == torch.tensor(right)).float().mean().item()

    assert accuracy(output) == pytest.approx(max(row["eval_accuracy"] for row in rows), abs=1e-6)
    assert accuracy(output / "final") == pytest.approx(rows[-1]["eval_accuracy"], abs=1e-6)
    best, final = (load_file(one / "model.safetensors") for one in (output, output / "final"))
    assert any(not value.equal(final[name]) for name, value in best.items())
    kept = training_summary(json.loads((output / "history.json").read_text()), "accuracy")
    assert kept["validation_accuracy"] == max(row["eval_accuracy"] for row in rows)


def test_only_named_classes_are_compared_and_only_their_scores_are_cached(over_classes):
    change(over_classes, "targets", kind="topk")
    with pytest.raises(UserError, match="targets: expected kind hidden, because over is classes, found topk"):
        params.load(over_classes / "params.yaml")
    change(over_classes, "targets", kind="hidden", over="tokens")
    change(over_classes, "train", best="accuracy")
    with pytest.raises(UserError, match=r"train.best: expected objective, because targets.over is tokens, found accur"):
        params.load(over_classes / "params.yaml")
    change(over_classes, "train", best="objective")
    change(over_classes, "targets", class_scores="mean")
    with pytest.raises(UserError, match="targets: expected class_scores sum, because over is tokens, found mean"):
        params.load(over_classes / "params.yaml")
    change(over_classes, "targets", over="classes", class_scores="calibrated")
    change(over_classes, "data", prompt=None)
    with pytest.raises(
        UserError, match=r"targets.class_scores: expected sum or mean, because data.prompt is null, and"
    ):
        params.load(over_classes / "params.yaml")
    change(over_classes, "targets", class_scores="sum")
    change(over_classes, "data", classes=None)
    with pytest.raises(UserError, match=r"targets.over: expected tokens, because data.classes is null, found classes"):
        params.load(over_classes / "params.yaml")
