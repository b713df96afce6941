"""Encoders such as bert-tiny: fetched, taught classes by a language model, evaluated, and refused for anything else."""

import json
from contextlib import chdir

import pytest
import torch
from conftest import change, run_stage, workspace
from safetensors.torch import load_file, save_file
from test_class_targets import CLASSES, write_classes
from text_families import BERT_POSITIONS, save_bert, text_workspace
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, BertModel

from firstsight.acquisition.checks import check_weights
from firstsight.asking.question import question_alone
from firstsight.cli import app
from firstsight.core.errors import UserError
from firstsight.core.variants import LEFT_OUT
from firstsight.generation.pytorch_model import ClassModel
from firstsight.models.heads import has_head
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.packing.dataset import EncoderDataset, encoder_batch
from firstsight.packing.forward import as_sums, class_scores
from firstsight.packing.pack import IGNORE
from firstsight.publishing.model_card import model_card
from firstsight.training.adapters import TrainableModel


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    save_bert(folder)
    return folder


def with_head(source, folder, names=CLASSES):
    model = load_model(source, "float32", "cpu", classes=names)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_bytes((source / "vocab.txt").read_bytes())
    return folder


def test_a_checkpoint_without_a_classification_head_is_complete(bert, tmp_path):
    check_weights(bert, "bert")
    # As a sentence encoder's: the body alone, its names without the model's prefix.
    body = BertModel.from_pretrained(bert)
    body.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_bytes((bert / "vocab.txt").read_bytes())
    check_weights(tmp_path, "body")
    found, other = (load_model(one, "float32", "cpu", classes=CLASSES).state_dict() for one in (tmp_path, bert))
    assert all(found[name].equal(value) for name, value in other.items())


def test_a_body_that_is_not_complete_is_refused(bert, tmp_path):
    weights = load_file(bert / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    (tmp_path / "config.json").write_bytes((bert / "config.json").read_bytes())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 that do not fit \(bert.encoder.layer.1.output.dense.weight: miss"):
        check_weights(tmp_path, "bert")
    with pytest.raises(UserError, match=r"no fitting weight for bert.encoder.layer.1.output.dense.weight and 0 more"):
        load_model(tmp_path, "float32", "cpu", classes=CLASSES)


def test_a_new_head_is_the_same_every_time_and_a_stored_one_is_kept(bert, tmp_path):
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    first, second = (load_model(bert, "float32", "cpu", classes=CLASSES) for _ in range(2))
    assert torch.rand(3).equal(drawn)
    assert first.classifier.weight.shape == (3, 32)
    assert first.classifier.weight.equal(second.classifier.weight)
    assert first.config.id2label == dict(enumerate(CLASSES))
    first.classifier.weight.data.normal_()
    first.save_pretrained(tmp_path)
    assert has_head(tmp_path, CLASSES)
    assert not has_head(tmp_path, CLASSES[::-1])
    assert not has_head(bert, CLASSES)
    again = load_model(tmp_path, "float32", "cpu", classes=CLASSES)
    assert again.classifier.weight.equal(first.classifier.weight)
    wider = load_model(tmp_path, "float32", "cpu", classes=(*CLASSES, "plenty"))
    assert wider.classifier.weight.shape == (4, 32)


def test_a_stored_head_of_as_many_other_classes_is_not_kept(bert, tmp_path):
    others = load_model(bert, "float32", "cpu", classes=("no", "yes", "maybe"))
    others.classifier.weight.data.fill_(7.0)
    others.save_pretrained(tmp_path)
    found, new = (load_model(one, "float32", "cpu", classes=CLASSES) for one in (tmp_path, bert))
    assert found.classifier.weight.equal(new.classifier.weight)
    assert found.classifier.weight.std() > 0
    assert found.bert.embeddings.word_embeddings.weight.equal(new.bert.embeddings.word_embeddings.weight)


def test_an_encoder_gives_no_text(bert):
    with pytest.raises(UserError, match=r"expected a model that answers in text, found an encoder \(bert\)"):
        load_model(bert, "float32", "cpu")
    with pytest.raises(UserError, match=r"expected a model whose language model can be quantized to nf4, found an enc"):
        load_model(bert, "nf4", "cpu", classes=CLASSES)


def asked(folder, project, capsys, *more):
    """The lines in which models answer that `firstsight ask` prints in a project whose data have `CLASSES`."""
    change(workspace(project), "data", source="csv", path="rows.csv", classes=list(CLASSES), prompt="About {text}")
    with chdir(project):
        app.run(["ask", str(folder), "two plants", *more])
    return capsys.readouterr().out.splitlines()[4:]


def test_a_model_of_classes_is_asked_for_the_best_with_its_probability(bert, language_models, tmp_path, capsys):
    """An encoder names its own classes; those of params.yaml may be others."""
    own = ("vegetable", "mineral")
    encoder = with_head(bert, tmp_path / "encoder", own)
    project = tmp_path / "project"
    project.mkdir()
    lines = asked(encoder, project, capsys, "--compare", str(language_models["gpt2"]))
    sample = question_alone("About two plants", None)
    for folder, names, line in zip((encoder, language_models["gpt2"]), (own, CLASSES), lines, strict=True):
        loaded = load_model(folder, "float32", "cpu", classes=names)
        model = ClassModel(loaded, load_processor(folder), "float32", names, as_sums)
        ((name, share),) = model.classify([(sample, sample.records[0])])
        assert line.endswith(f" s  {name} ({share:.2f})")


def test_a_long_text_is_asked_whole_and_printed_in_part(bert, tmp_path, capsys, monkeypatch):
    read = []
    monkeypatch.setattr("firstsight.cli.ask.second_answer", lambda _, sample, *__: read.append(sample) or 1 / 0)
    encoder = with_head(bert, tmp_path / "encoder")
    text = "植物" * 300  # without a space at which to cut
    with chdir(workspace(tmp_path)), pytest.raises(ZeroDivisionError):
        app.run(["ask", str(encoder), text])
    assert read[0].records[0].prompt() == text
    assert capsys.readouterr().out.splitlines()[0] == f"question  {text[:400]} ..."


def test_an_encoder_that_was_taught_no_classes_is_not_asked(bert, tmp_path, capsys):
    with pytest.raises(UserError, match=r"expected an encoder that was taught classes, found one without a head for"):
        asked(bert, tmp_path, capsys)


@torch.inference_mode()
def test_logits_in_a_batch_are_those_of_each_prompt_alone(bert, tmp_path):
    model, processor = load_model(bert, "float32", "cpu", classes=CLASSES), load_processor(bert)
    split = write_classes(tmp_path / "train.parquet")
    dataset = EncoderDataset(split, processor).padded_to_multiple(4)
    batch = dataset.collate([dataset[number] for number in range(4)])
    assert batch["labels"].tolist() == [1, 0, IGNORE, 1, *[IGNORE] * 4]
    found = class_scores(model, batch, 3)
    prompts = [record.prompt() for sample in split for record in sample.records]
    reference = AutoModelForSequenceClassification.from_pretrained(with_head(bert, tmp_path)).eval()
    alone = [reference(**processor.tokenizer(one, return_tensors="pt")).logits[0] for one in prompts]
    torch.testing.assert_close(found, torch.stack(alone), atol=1e-6, rtol=1e-5)
    questions = [(sample, record) for sample in split for record in sample.records]
    classified = ClassModel(model, processor, "float32", CLASSES, as_sums).classify(questions)
    assert [CLASSES.index(name) for name, _ in classified] == found.argmax(-1).tolist()
    assert class_scores(model, encoder_batch(processor, prompts), 3).equal(found)


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_the_head_is_trained_whole_beside_adapters(bert, tmp_path, settings, method):
    adapter = settings.train.adapter.model_copy(update={"rank": 4, "target_modules": None})
    tuned = settings.train.model_copy(update={"method": method, "adapter": adapter})
    trainable = TrainableModel(bert, tuned, "cpu", 10, classes=CLASSES)
    trained = [name for name, parameter in trainable.model.named_parameters() if parameter.requires_grad]
    assert any("classifier.modules_to_save" in name for name in trained)
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    with torch.no_grad():
        for parameter in trainable.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    batch = encoder_batch(load_processor(bert), ["What is at place 1?"])
    with torch.no_grad():
        expected = class_scores(trainable.model.eval(), batch, 3)
    trainable.save_merged(tmp_path)
    assert has_head(tmp_path, CLASSES)
    with torch.no_grad():
        found = class_scores(load_model(tmp_path, "float32", "cpu", classes=CLASSES), batch, 3)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def run_workspace(folder, settings, processor, bert, teacher="gpt2"):
    """A language model (or an encoder) and bert-tiny as its student, with records of classes."""
    folder = text_workspace(folder, settings, processor, "gpt2", "gpt2")
    for role in ("student", *(["teacher"] if teacher == "bert" else [])):
        change(folder, "models", **{role: {"source": str(bert), "revision": None, "init": None}})
        run_stage(folder, "download_models", role)
    change(folder, "data", source="csv", classes=list(CLASSES), prompt="{text}")
    change(folder, "targets", over="classes", batch_size=4)
    change(folder, "finetune_teacher", epochs=4, learning_rate=5e-3, train_vision=True, batch_size=2)
    change(folder, "train", alpha=0.7, temperature=3.0, epochs=6, train_vision=True, method="full", batch_size=2)
    change(folder, "train", best="accuracy", learning_rate=5e-3)
    change(folder, "control", enabled=True)
    change(folder, "evaluate", bootstrap_samples=100, latency_runs=2)
    things = ("cup", "animal", "plant")
    for split in ("train", "validation", "test"):
        asked = {f"{split}-{n}": [(f"Which is {things[n % 3]}? {n}", CLASSES[n % 3])] for n in range(24)}
        write_classes(folder / f"data/egoqa/{split}.parquet", asked)
    return folder


@pytest.mark.system
@pytest.mark.parametrize("teacher", ["gpt2", "bert"])
def test_an_encoder_learns_classes_from_a_language_model_or_an_encoder(settings, processor, tmp_path, bert, teacher):
    folder = run_workspace(tmp_path / "run", settings, processor, bert, teacher)
    assert (folder / "models/student/tokenizer.json").exists()
    for stage in ("check_inputs", "finetune_teacher", "cache_teacher_targets", "distill", "finetune_student"):
        run_stage(folder, stage)
    run_stage(folder, "quantize_student", "nf4")
    assert "the student is an encoder (bert)" in (folder / "models/student-nf4" / LEFT_OUT).read_text()
    for variant in ("teacher", "student", "student-distilled", "student-finetuned", "student-nf4"):
        run_stage(folder, "evaluate", variant)
    found = {
        variant: json.loads((folder / f"evaluations/{variant}/quality.json").read_text())["exact_match"]
        for variant in ("teacher", "student", "student-distilled")
    }
    assert found["student"] < 0.5 < found["student-distilled"]
    student = BertForSequenceClassification.from_pretrained(folder / "models/student-distilled")
    assert student.config.id2label == dict(enumerate(CLASSES))
    history = json.loads((folder / "models/student-distilled/history.json").read_text())
    objectives = [row["eval_objective"] for row in history if "eval_objective" in row]
    assert min(objectives) < 0.95 * objectives[0]


def no_tokens(folder, bert):
    change(folder, "targets", over="tokens")
    change(folder, "train", best="objective")
    return "models/student: expected a model that answers in text, because targets.over is tokens, found an encoder"


def no_tokens_of_a_teacher(folder, bert):
    change(folder, "models", teacher={"source": str(bert), "revision": None, "init": None})
    run_stage(folder, "download_models", "teacher")
    return no_tokens(folder, bert).replace("student", "teacher")


def no_head(folder, bert):
    change(folder, "models", teacher={"source": str(bert), "revision": None, "init": None})
    run_stage(folder, "download_models", "teacher")
    change(folder, "finetune_teacher", enabled=False)
    return "models/teacher: expected a classification head for the 3 classes a red cup, two, in your left hand, in this"


def too_long(folder, bert):
    write_classes(folder / "data/egoqa/test.parquet", {"long": [("Why? " * 20, "two")]})
    return f"record long-0: expected at most {BERT_POSITIONS} tokens, as many as models/student has positions for"


def student_over_nf4(folder, bert):
    change(folder, "train", method="qlora")
    return "train.method: expected lora, because models/student is an encoder, of which no part is quantized"


def quantized_to_evaluate(folder, bert):
    change(folder, "evaluate", precision="int8")
    return "evaluate.precision: expected auto, because models/student is an encoder, of which no part"


def not_exported(folder, bert):
    change(folder, "export", formats=["onnx"], teacher=True)
    return "models/teacher: expected Qwen2-VL or a model of text alone such as Qwen2, which are exported to ONNX, found"


@pytest.mark.parametrize(
    "break_it",
    [
        no_tokens,
        no_tokens_of_a_teacher,
        no_head,
        too_long,
        student_over_nf4,
        quantized_to_evaluate,
        not_exported,
    ],
)
def test_an_encoder_that_does_not_fit_is_one_line_before_anything_is_trained(
    settings, processor, tmp_path, bert, break_it
):
    folder = run_workspace(tmp_path / "run", settings, processor, bert)
    line = break_it(folder, bert)
    with pytest.raises(UserError) as error:
        run_stage(folder, "check_inputs")
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        (("targets", "precision"), "nf4", "targets.precision: expected auto, because models/teacher is an encoder"),
        (
            ("targets", "class_scores"),
            "mean",
            "targets.class_scores: expected sum, because models/teacher is an encoder",
        ),
        (
            ("evaluate", "teacher_methods"),
            ["int8"],
            "evaluate.teacher_methods: expected [], because models/teacher",
        ),
        (
            ("finetune_teacher", "method"),
            "qlora",
            "finetune_teacher.method: expected lora, because models/teacher",
        ),
    ],
)
def test_a_teacher_that_is_an_encoder_is_not_quantized(settings, processor, tmp_path, bert, key, value, line):
    folder = run_workspace(tmp_path / "run", settings, processor, bert, "bert")
    change(folder, key[0], **{key[1]: value})
    with pytest.raises(UserError) as error:
        run_stage(folder, "check_inputs")
    assert line in str(error.value)


def test_the_card_of_an_encoder_says_what_it_is_and_how_to_load_it(settings, processor, tmp_path, bert, monkeypatch):
    folder = run_workspace(tmp_path / "run", settings, processor, bert)
    (folder / "models/student-distilled").mkdir()
    with_head(bert, folder / "models/student-distilled")
    share = {"exact_match": 0.9, "exact_match_low": 0.8, "exact_match_high": 1.0, "macro_f1": 0.85, "f1": 0.9}
    share |= {"calibration_error": 0.1, "rouge_l": 0.9, "questions": 24, "by_class": {name: {} for name in CLASSES}}
    fast = {"parameters": 1000, "disk_bytes": 1, "weights_bytes": 1, "peak_bytes": 1, "latency_ms_p50": 1.0}
    (folder / "metrics").mkdir(exist_ok=True)
    models = {
        role: {"source": "a/b", "commit": None, "licence": "mit", "architecture": "BertModel"}
        for role in ("teacher", "student")
    }
    for name, value in (
        ("quality", {"student-distilled": share, "student-onnx": share, "teacher": share}),
        ("performance", {"student-distilled": fast, "student-onnx": fast, "teacher": fast}),
        ("models", models),
    ):
        (folder / f"metrics/{name}.json").write_text(json.dumps(value))
    for variant in ("student-distilled", "student-onnx", "teacher"):
        (folder / f"evaluations/{variant}").mkdir(parents=True)
        (folder / f"evaluations/{variant}/performance.json").write_text(
            json.dumps({"engine": "PyTorch", "device": "x", "precision": "float32"})
        )
    splits = {split: {"records": 24, "samples": 24} for split in ("train", "validation", "test")}
    (folder / "data/egoqa/card.json").write_text(json.dumps({"source": "csv", "commit": None, "splits": splits}))
    monkeypatch.chdir(folder)
    card = model_card("student-distilled", "models/student-distilled")
    assert "pipeline_tag: text-classification" in card
    assert "egocentric" not in card
    assert "A text classifier of 1 k parameters." in card
    assert f"It tells 3 classes apart: {', '.join(CLASSES)}." in card
    assert "\n{text}\n" in card
    assert "| accuracy | 0.900 (0.80 to 1.00) |" in card
    assert "| macro-F1 | 0.850 |" in card
    assert "exact match" not in card
    code = card.partition("```python\n")[2].partition("```")[0]
    printed = []
    exec(code, {"print": printed.append})  # the example of the card, on the folder that it names
    assert printed[0] in CLASSES
    (folder / "models/student-onnx").mkdir()
    (folder / "models/student-onnx/config.json").write_bytes(
        (folder / "models/student-distilled/config.json").read_bytes()
    )
    for prompt, asked in (
        ("{text}", '"The text of a record."'),
        ("{title}: {text}", """'{"title": "...", "text": "..."}'"""),
    ):
        change(folder, "data", prompt=prompt)
        card = model_card("student-onnx", "models/student-onnx")
        assert f"python -m firstsight ask models/student-onnx {asked}\n" in card
        assert "max_pixels" not in card.partition("## Usage")[2].partition("## Measured")[0]
        assert "The answer is the class with the highest score, and its probability. What is given fills the" in card


def test_a_teacher_with_a_head_for_the_classes_needs_no_training(settings, processor, tmp_path, bert):
    folder = run_workspace(tmp_path / "run", settings, processor, bert)
    (tmp_path / "headed").mkdir()
    with_head(bert, tmp_path / "headed")
    change(folder, "models", teacher={"source": str(tmp_path / "headed"), "revision": None, "init": None})
    run_stage(folder, "download_models", "teacher")
    change(folder, "finetune_teacher", enabled=False)
    run_stage(folder, "check_inputs")
