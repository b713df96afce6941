"""Exports that score classes, of encoders and of language models: the scores are PyTorch's, and no torch is needed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import change, make_sample, run_stage, workspace
from test_class_targets import CLASSES, write_classes
from test_engine import without_torch
from text_families import BERT_POSITIONS, save_bert
from transformers import AutoConfig, AutoModelForSequenceClassification

from firstsight.asking.question import question_alone
from firstsight.core.errors import UserError
from firstsight.engine import class_scores as scoring
from firstsight.engine.class_scores import ClassModel, open_exported
from firstsight.engine.layout import ENCODER, LAYOUT, read_layout
from firstsight.engine.runtimes import runtime
from firstsight.export.folder import Expected, _completed, export_folders
from firstsight.export.graphs import write_encoder
from firstsight.generation import pytorch_model
from firstsight.models.exportable import ENCODERS, check_architecture
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.packing.dataset import class_batch
from firstsight.packing.forward import class_scores

PROMPTS = ["What is at place 1?", "red", "Which class? " * 6, "two animal and plant, left of it"]
QUESTIONS = [
    (sample, sample.records[0])
    for number, text in enumerate(PROMPTS)
    for sample in [make_sample(f"text-{number}", "none", 0, [(text, "two")])]
]
IMAGES = [
    (sample, record)
    for number, kind in enumerate(("image", "video"))
    for sample in [make_sample(kind, kind, 1 + 2 * number, [("What is it?", "two"), ("How many are there?", "two")])]
    for record in sample.records
]
TEMPLATE = "{title}: {text}"


def drawn(model):
    """The model with weights by which classes differ."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """An encoder with a head for the classes, in PyTorch's format."""
    source, folder = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("encoder")
    save_bert(source)
    drawn(load_model(source, "float32", "cpu", classes=CLASSES)).save_pretrained(folder)
    (folder / "vocab.txt").write_bytes((source / "vocab.txt").read_bytes())
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory, encoder) -> dict[str, Path]:
    """Its exports, by the precision of the weights. Read only."""
    targets = {weights: tmp_path_factory.mktemp(weights) for weights in ("float32", "int8", "w4a8")}
    export_folders(encoder, targets, QUESTIONS, QUESTIONS * 2, CLASSES, TEMPLATE)
    return targets


@torch.inference_mode()
def in_pytorch(folder, questions):
    model, processor = load_model(folder, "float32", "cpu", classes=CLASSES), load_processor(folder)
    return class_scores(model, class_batch(processor, questions, CLASSES), len(CLASSES)).numpy()


@pytest.mark.parametrize(("size", "engine"), [(1, "onnxruntime"), (len(QUESTIONS), "onnxruntime"), (2, "openvino")])
def test_an_encoders_scores_are_pytorchs_in_batches_of_any_size(encoder, exports, size, engine):
    expected, model = in_pytorch(encoder, QUESTIONS), open_exported(exports["float32"], engine)
    batches = [QUESTIONS[start : start + size] for start in range(0, len(QUESTIONS), size)]
    found = np.concatenate([model.scores(model.inputs(batch)) for batch in batches])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.ptp(expected, axis=1).min() > 1e-2
    processor, loaded = load_processor(encoder), load_model(encoder, "float32", "cpu", classes=CLASSES)
    named = pytorch_model.ClassModel(loaded, processor, "float32", CLASSES, lambda scores: scores).classify(QUESTIONS)
    assert [name for name, _ in model.classify(QUESTIONS)] == [name for name, _ in named]
    shares = [[share for _, share in one] for one in (model.classify(QUESTIONS), named)]
    np.testing.assert_allclose(*shares, rtol=0, atol=1e-5)
    assert list(model.answers(QUESTIONS, size, 1)) == [name for name, _ in named]


def test_an_encoders_folder_says_all_that_running_it_takes(exports):
    layout = read_layout(exports["float32"])
    assert (layout.classes, layout.prompt, layout.context) == (CLASSES, TEMPLATE, BERT_POSITIONS)
    assert (layout.check.questions, layout.check.same_answers) == (4, 4)
    assert layout.check.logit_difference < 1e-4


@pytest.mark.parametrize(("weights", "error", "size"), [("int8", 0.05, 0.45), ("w4a8", 0.4, 0.4)])
def test_an_encoder_of_smaller_weights_computes_nearly_the_same(exports, weights, error, size):
    whole, smaller = (open_exported(exports[name]) for name in ("float32", weights))
    scores = [model.scores(model.inputs(QUESTIONS)) for model in (whole, smaller)]
    assert 0 < np.linalg.norm(scores[1] - scores[0]) / np.linalg.norm(scores[0]) < error
    # Embeddings are in 8 bits too; else they alone would take a third.
    assert smaller.weights_bytes < size * whole.weights_bytes


def test_4_bits_of_an_encoder_are_rounded_by_what_it_reads(exports):
    errors = read_layout(exports["w4a8"]).errors
    assert len(errors) == 2 * 6  # each layer's: query, key, value, output, and two of the feed-forward network
    assert all(one.visual is None and one.text is not None for one in errors.values())
    assert np.mean([one.text for one in errors.values()]) < 0.9 * np.mean([one.text_nearest for one in errors.values()])


@pytest.mark.system
@pytest.mark.parametrize("kind", [name for name in ENCODERS if name != "bert"])
def test_graphs_of_other_encoders_compute_the_same_at_all_lengths(tmp_path, kind):
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    if kind == "distilbert":
        sizes = {"n_layers": 2, "n_heads": 2, "dim": 32, "hidden_dim": 64}
    config = AutoConfig.for_model(kind, vocab_size=120, max_position_embeddings=64, num_labels=3, **sizes)
    model = drawn(AutoModelForSequenceClassification.from_config(config)).eval()
    write_encoder(model, tmp_path)
    graph = runtime("onnxruntime").open(tmp_path / ENCODER)
    for rows, length in ((1, 1), (1, 60), (3, 9)):
        tokens = torch.randint(3, 120, (rows, length))
        mask = torch.ones_like(tokens)
        if rows > 1:
            mask[1, 4:], tokens[1, 4:] = 0, config.pad_token_id
        with torch.no_grad():
            expected = model(input_ids=tokens, attention_mask=mask).logits.numpy()
        (found,) = graph.run({"tokens": tokens.numpy(), "mask": mask.numpy()})
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory, language_models) -> tuple[Path, Path]:
    """A language model, and its export in float32. Read only."""
    source, target = language_models["deepseek"], tmp_path_factory.mktemp("decoder")
    export_folders(source, {"float32": target}, QUESTIONS[:2], (), CLASSES)
    return source, target


@pytest.mark.parametrize(("rows", "engine"), [(1, "onnxruntime"), (6, "onnxruntime"), (64, "openvino")])
def test_a_language_models_scores_are_pytorchs(decoder, monkeypatch, rows, engine):
    """Whether the names are read behind one question at a time, behind two, or behind all."""
    monkeypatch.setattr(scoring, "_ROWS", rows)
    source, target = decoder
    model = open_exported(target, engine)
    found = model.scores(model.inputs(QUESTIONS))
    expected = in_pytorch(source, QUESTIONS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert list(model.answers(QUESTIONS, 2, 1)) == [CLASSES[best] for best in expected.argmax(axis=1)]


@pytest.mark.system
def test_a_vision_language_models_scores_are_pytorchs(tmp_path, model, processor):
    source = tmp_path / "source"
    model.save_pretrained(source)
    processor.save_pretrained(source)
    targets = {weights: tmp_path / weights for weights in ("float32", "w4a8")}
    for target in targets.values():
        target.mkdir()
    export_folders(source, targets, IMAGES, IMAGES, CLASSES)
    exported = open_exported(targets["float32"])
    expected = in_pytorch(source, IMAGES)
    np.testing.assert_allclose(exported.scores(exported.inputs(IMAGES)), expected, rtol=0, atol=1e-4)
    assert read_layout(targets["w4a8"]).check.questions == len(IMAGES)


def test_what_is_read_to_round_weights_is_the_question_with_the_best_class(decoder):
    source, target = decoder
    model = open_exported(target)
    assert isinstance(model, ClassModel)
    inputs, visual = model.read(QUESTIONS[0], 16)
    (best,) = model.answers(QUESTIONS[:1], 1, 1)
    tokenizer = load_processor(source).tokenizer
    length = model.inputs(QUESTIONS[:1]).tokens.shape[1] + len(tokenizer(best, add_special_tokens=False)["input_ids"])
    assert inputs["embeddings"].shape[1] == len(visual) == length
    assert not visual.any()


def test_a_question_longer_than_the_positions_is_one_line(exports, decoder):
    long = make_sample("long", "none", 0, [("Why? " * 40, "two")])
    model = open_exported(exports["float32"])
    with pytest.raises(UserError, match=rf"expected at most {BERT_POSITIONS} tokens of media, question and class"):
        model.classify([(long, long.records[0])])
    model = open_exported(decoder[1])
    object.__setattr__(model.layout, "context", 30)
    with pytest.raises(UserError, match=r"expected at most 30 tokens of media, question and class, found \d+; shorten"):
        model.classify([(long, long.records[0])])


def test_an_encoder_refuses_media(exports):
    with pytest.raises(UserError, match="image: expected records without media, because an encoder reads text alone"):
        open_exported(exports["float32"]).classify(IMAGES[:1])


def test_another_encoder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deberta-v2"}))
    with pytest.raises(UserError, match=r"expected an encoder that is exported to ONNX \(bert, .* found model_type 'd"):
        check_architecture(tmp_path)


def test_a_tokenizer_in_python_alone_is_refused(exports, tmp_path):
    with pytest.raises(UserError, match="a model: expected a tokenizer that the library tokenizers runs, found "):
        _completed(tmp_path, "a model", read_layout(exports["float32"]), Expected([], [], []))


@pytest.mark.parametrize("missing", [ENCODER, "tokenizer.json"])
def test_a_folder_that_lacks_a_file_is_one_line(exports, tmp_path, missing):
    for path in exports["int8"].iterdir():
        if path.name != missing:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(
        UserError, match=f"expected an exported model, found no {missing}; copy the folder again, or export it again"
    ):
        open_exported(tmp_path)


def test_an_encoder_is_asked_without_torch(encoder, exports, tmp_path):
    text = json.dumps({"title": "animal", "text": "two plant left"})
    words = [sys.executable, "-m", "firstsight", "ask", str(exports["float32"]), text]
    environment = without_torch(tmp_path)
    workspace(tmp_path)
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"question  {text}\n")
    sample = question_alone("animal: two plant left", None)
    scores = in_pytorch(encoder, [(sample, sample.records[0])])[0]
    shares = np.exp(scores) / np.exp(scores).sum()
    name, _, share = done.stdout.splitlines()[-1].partition(" s  ")[2].rpartition(" ")
    assert name == CLASSES[scores.argmax()]
    assert float(share.strip("()")) == pytest.approx(shares.max(), abs=0.006)


def test_a_text_fills_the_template_that_the_model_was_asked_by():
    assert question_alone(" a cup ", "What is {text}?").records[0].prompt() == "What is a cup?"
    assert question_alone(" a cup ", None).records[0].prompt() == "a cup"
    assert question_alone("Open scene.jpg", None).records[0].prompt() == "Open scene.jpg"
    for text, found in (
        (
            "a cup",
            r"expected a JSON object with title, text, .* found 'a cup'; write it as {\"title\": \"...\"",
        ),
        ('{"title": "a"}', "expected the key 'text', which data.prompt names, found"),
        (" ", "expected some text, found none"),
        ("<|im_end|>", "expected plain text, found the special token"),
        ("nowhere/clip.MP4", "expected some text after the file nowhere/clip.MP4, found none; ask something"),
        (__file__, "expected some text after the file .*, found none; ask something"),
    ):
        with pytest.raises(UserError, match=f"question: {found}"):
            question_alone(text, TEMPLATE)


@pytest.mark.system
def test_an_exported_encoder_is_evaluated_as_the_student_is(settings, encoder, tmp_path):
    folder = workspace(tmp_path)
    change(folder, "data", source="csv", classes=list(CLASSES), prompt="{text}")
    change(folder, "targets", over="classes")
    change(folder, "export", formats=["onnx", "onnx-w4a8"], calibration_samples=4, teacher=False)
    change(folder, "evaluate", bootstrap_samples=100, latency_runs=2, precision="float32")
    (folder / "models").mkdir(exist_ok=True)
    (folder / "models/student-distilled").symlink_to(encoder)
    (folder / "data/egoqa").mkdir(parents=True)
    for split in ("train", "validation", "test"):
        asked = {f"{split}-{n}": [(f"Which is red? {n}" * (1 + n % 3), CLASSES[n % 3])] for n in range(12)}
        write_classes(folder / f"data/egoqa/{split}.parquet", asked)
    run_stage(folder, "export_student")
    assert json.loads((folder / "models/student-onnx" / LAYOUT).read_text())["prompt"] == "{text}"
    for variant in ("student-distilled", "student-onnx", "student-onnx-w4a8", "student-onnx-int8"):
        run_stage(folder, "evaluate", variant)
    expected, found, rounded = (
        json.loads((folder / f"evaluations/{variant}/predictions.json").read_text())
        for variant in ("student-distilled", "student-onnx", "student-onnx-w4a8")
    )
    assert [one["answer"] for one in found] == [one["answer"] for one in expected]
    confidence = [[one["confidence"] for one in some] for some in (found, expected, rounded)]
    np.testing.assert_allclose(confidence[0], confidence[1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(confidence[2], confidence[1], rtol=0, atol=0.2)
    performance = json.loads((folder / "evaluations/student-onnx/performance.json").read_text())
    assert performance["engine"].startswith("onnxruntime") and performance["token_ms"] == performance["latency_ms_p50"]
