"""What is exported, what is refused, and that nothing half-written stays."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, change, make_sample, run_stage, workspace
from families import SAVE
from text_families import TEXT_SAVE

from firstsight.core.errors import UserError
from firstsight.core.variants import LEFT_OUT
from firstsight.engine.exported_model import ExportedModel
from firstsight.engine.layout import LAYOUT, VISION
from firstsight.export import folder as exporting
from firstsight.export.folder import compare, export_folders
from firstsight.export.graphs import write_graphs
from firstsight.generation.answering import answers
from firstsight.models.exportable import check_architecture
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.planning.model_shape import Shape
from firstsight.records.parquet import SplitWriter

TEXT = make_sample("text", "none", 0, [("What is in your left hand?", "a cup"), ("How many?", "two")])
IMAGE = make_sample("image", "image", 1, [("How many?", "two")])


@pytest.fixture(scope="module")
def text_export(tmp_path_factory, settings, processor) -> tuple[Path, Path]:
    """A model of text alone, and its export. Read only."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    SAVE["Qwen2ForCausalLM"](source, settings, processor)
    export_folders(source, {"float32": target}, [])
    return source, target


def test_a_model_of_text_alone_answers_as_in_pytorch(text_export):
    source, target = text_export
    questions = [(TEXT, record) for record in TEXT.records]
    expected = list(answers(load_model(source, "float32", "cpu"), load_processor(source), questions, 2, 8))
    exported = ExportedModel(target)
    assert list(exported.answers(questions, 2, 8)) == expected
    assert list(exported.answers(questions, 1, 8)) == expected
    assert not (target / VISION).exists()
    assert exported.layout.check is None


def test_a_template_with_a_begin_token_is_encoded_as_in_pytorch(tmp_path_factory, settings, processor):
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    TEXT_SAVE["deepseek"](source, settings, processor)
    export_folders(source, {"float32": target}, [])
    questions = [(TEXT, record) for record in TEXT.records]
    expected = list(answers(load_model(source, "float32", "cpu"), load_processor(source), questions, 2, 8))
    assert list(ExportedModel(target).answers(questions, 2, 8)) == expected


def test_gpt2_is_not_exported(tmp_path_factory, settings, processor):
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    TEXT_SAVE["gpt2"](source, settings, processor)
    with pytest.raises(UserError, match="expected Qwen2-VL or a model of text alone such as Qwen2, which are exported"):
        export_folders(source, {"float32": target}, [])


def test_a_model_of_text_alone_refuses_media(text_export):
    with pytest.raises(UserError, match="image: expected records without media, because this model reads text alone"):
        list(ExportedModel(text_export[1]).answers([(IMAGE, IMAGE.records[0])], 1, 8))


def test_graphs_that_compute_something_else_are_refused(text_export):
    source, target = text_export
    model = load_model(source, "float32", "cpu")
    with torch.no_grad():
        model.model.norm.weight *= 1.01
    with pytest.raises(RuntimeError, match="expected the logits of the exported model, found them"):
        compare(
            exporting._expected(model, load_processor(source), [(TEXT, TEXT.records[0])], ()), ExportedModel(target)
        )


@pytest.mark.parametrize("family", ["Qwen2_5_VLForConditionalGeneration", "LlavaOnevisionForConditionalGeneration"])
def test_other_vision_language_models_are_refused(tmp_path, settings, processor, family):
    SAVE[family](tmp_path, settings, processor)
    with pytest.raises(UserError) as error:
        check_architecture(tmp_path)
    assert f"{tmp_path}: expected Qwen2-VL or a model of text alone " in str(error.value)
    assert "leave its export out (export.formats: [], or export.teacher: false" in str(error.value)


def test_egogpt_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "egogpt"}))
    with pytest.raises(UserError, match="found model_type 'egogpt'"):
        check_architecture(tmp_path)


def test_a_processor_that_does_otherwise_is_refused(tmp_path, model, processor, monkeypatch):
    monkeypatch.setattr(processor.image_processor, "do_normalize", False)
    with pytest.raises(UserError, match=r"Qwen2VLImageProcessor: expected Qwen2-VL's processing .* 'do_normalize': Fa"):
        exporting._pictures(model, processor)


@pytest.fixture
def distilled(tmp_path, model, processor) -> Path:
    """A workspace with a distilled student and a validation split."""
    folder = workspace(tmp_path)
    model.save_pretrained(folder / "models/student-distilled")
    processor.save_pretrained(folder / "models/student-distilled")
    (folder / "data/egoqa").mkdir(parents=True)
    for name in ("train", "validation"):
        with SplitWriter(folder / f"data/egoqa/{name}.parquet") as split:
            split.write(IMAGE)
    change(folder, "export", formats=["onnx"])
    return folder


def test_what_is_missing_to_export_is_said_before_a_model_is_loaded(distilled, monkeypatch):
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnxscript" else object())
    monkeypatch.setattr(exporting, "load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"onnxscript: expected what exporting to ONNX needs, found it missing; pip"):
        run_stage(distilled, "export_student")


def test_a_disk_too_small_for_the_graphs_is_said_before_any_is_written(distilled, monkeypatch):
    change(distilled, "export", formats=["onnx", "onnx-int8"])
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(exporting, "write_graphs", lambda *_: pytest.fail("written"))
    with pytest.raises(UserError, match=r"expected 2\.\d MB free on the file system .*, found 0.0 MB; free some"):
        run_stage(distilled, "export_student")
    assert [path.name for path in (distilled / "models").iterdir()] == ["student-distilled"]


@pytest.mark.system
def test_one_tracing_serves_each_format(distilled, model, monkeypatch):
    traced = []
    monkeypatch.setattr(exporting, "write_graphs", lambda *given: traced.append(write_graphs(*given)))
    change(distilled, "export", formats=["onnx-w4a8", "onnx-int8"])
    run_stage(distilled, "export_student")
    assert len(traced) == 1
    weights = {}
    for name in ("student-onnx-int8", "student-onnx-w4a8"):
        exported = ExportedModel(distilled / "models" / name)
        assert exported.layout.check.questions == 1
        weights[exported.layout.weights] = exported.weights_bytes
        assert not [path for path in exported.folder.iterdir() if path.is_dir()]
    planned = Shape("it", model)
    for name, size in weights.items():
        # Blocks are of 64 rows, and these layers have fewer.
        assert planned.exported_bytes(name) == pytest.approx(size, rel=0.1)
    # One question says too little of inputs: weights are rounded to the nearest.
    errors = exported.layout.errors.values()
    assert errors and all((one.visual, one.text) == (one.visual_nearest, one.text_nearest) for one in errors)
    assert (distilled / "models/student-onnx" / LEFT_OUT).exists()


@pytest.mark.system
def test_without_calibration_weights_are_rounded_to_the_nearest(distilled):
    change(distilled, "export", formats=["onnx-w4a8"], calibration_samples=0)
    run_stage(distilled, "export_student")
    assert ExportedModel(distilled / "models/student-onnx-w4a8").layout.errors == {}


def test_an_export_that_is_not_asked_for_is_left_out(distilled):
    change(distilled, "export", formats=[])
    for stage in ("export_student", "export_teacher"):
        run_stage(distilled, stage)
    for name, reason in (
        ("student-onnx-int8", "export.formats is [], without onnx-int8"),
        ("teacher-onnx", "export.teacher is false"),
    ):
        assert json.loads((distilled / "models" / name / LEFT_OUT).read_text()) == reason


@pytest.mark.system
def test_a_kill_leaves_the_earlier_export_and_the_next_run_nothing_else(distilled):
    earlier = distilled / "models/student-onnx"
    earlier.mkdir()
    (earlier / LAYOUT).write_text("earlier")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "stages.export_student"]
    process = subprocess.Popen(words, cwd=distilled, env=environment)
    while not list((distilled / "models").glob(f".*.partial/{VISION}")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (earlier / LAYOUT).read_text() == "earlier"
    run_stage(distilled, "export_student")
    assert json.loads((earlier / LAYOUT).read_text())["check"]["same_answers"] == 1
    left = {path.name for path in (distilled / "models").iterdir()}
    assert left == {"student-distilled", "student-onnx", "student-onnx-int8", "student-onnx-w4a8"}


@pytest.mark.system
def test_the_same_model_gives_the_same_files(tmp_path, text_export):
    """So that DVC measures it again only when it is another."""
    model = load_model(text_export[0], "float32", "cpu")
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write_graphs(model, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes(), path.name
