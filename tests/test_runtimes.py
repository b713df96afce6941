"""Exported folders in other engines than onnxruntime on the CPU: the same answers, or one line that says why not."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import change, run_stage, workspace
from onnxruntime.capi.onnxruntime_pybind11_state import EPFail
from test_engine import QUESTIONS, half_a_graph, no_weights, on_device  # noqa: F401 (a fixture)

from firstsight.acquisition.initialise import build_model
from firstsight.asking.asked_model import AskedModel
from firstsight.cli import app
from firstsight.core import engines
from firstsight.core.errors import UserError
from firstsight.engine.exported_model import ExportedModel
from firstsight.engine.layout import DECODER
from firstsight.engine.runtimes import runtime
from firstsight.export.folder import export_folders

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
# How far logits may be apart, as a share of their norm: in 8 and 4 bits, products are rounded in another way.
TOLERANCE = {"float32": 1e-5, "int8": 0.05, "w4a8": 0.2}


@pytest.fixture(scope="module")
def source(tmp_path_factory, settings, processor) -> Path:
    """A model whose heads share keys and values, two and two."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    sizes = settings.models.teacher.init.model_copy(update={"heads": 4, "kv_heads": 2})
    build_model(sizes, processor.tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, source) -> dict[str, Path]:
    """Its exports, by their weights. Read only."""
    targets = {weights: tmp_path_factory.mktemp(weights) for weights in TOLERANCE}
    export_folders(source, targets, QUESTIONS[:1])
    return targets


@pytest.mark.parametrize("weights", TOLERANCE)
def test_openvino_computes_what_onnxruntime_does(folders, weights):
    """Of images and clips of several sizes and lengths, and of text, in batches that are padded."""
    expected, found = (ExportedModel(folders[weights], engine) for engine in ("onnxruntime", "openvino"))
    for some in [[one] for one in QUESTIONS[::3]] + [QUESTIONS]:
        logits = [model.first_logits(model.inputs(some)) for model in (expected, found)]
        assert np.linalg.norm(logits[1] - logits[0]) < TOLERANCE[weights] * np.linalg.norm(logits[0])
        if weights == "float32":
            np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=1e-3)
    answers = list(expected.answers(QUESTIONS, 4, 6))
    assert len(set(answers)) > 3
    for size in (1, 4) if weights == "float32" else ():
        assert list(found.answers(QUESTIONS, size, 6)) == answers


def test_openvino_is_named_and_computes_in_float32_by_as_many_threads(folders):
    models = [ExportedModel(folders["float32"], engine) for engine in ("onnxruntime", "openvino")]
    engine, other = (model.environment() for model in models)
    assert other["engine"].startswith("OpenVINO 20")
    assert {**engine, "engine": ""} == {**other, "engine": ""}
    for graph in (models[1]._decoder, models[1]._embeddings, models[1]._vision):
        assert graph._model.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
        assert graph._model.get_property("INFERENCE_NUM_THREADS") == models[0]._runtime.threads


def test_openvino_runs_a_folder_of_links(folders, tmp_path):
    """As `dvc checkout` makes it where the cache is on another disk."""
    (linked := tmp_path / "linked").mkdir()
    for path in folders["float32"].iterdir():
        cached = shutil.copy(path, tmp_path / f"cached-{path.name}")
        (linked / path.name).symlink_to(cached)
    found = ExportedModel(linked, "openvino").answers(QUESTIONS[:3], 1, 4)
    assert list(found) == list(ExportedModel(folders["float32"]).answers(QUESTIONS[:3], 1, 4))


@pytest.mark.parametrize("damage", [half_a_graph, no_weights])
def test_a_graph_that_openvino_does_not_run_is_refused_in_one_line(folders, tmp_path, damage):
    copied = Path(shutil.copytree(folders["float32"], tmp_path / "exported"))
    damage(copied)
    with pytest.raises(
        UserError,
        match=rf"{DECODER}: expected a graph that OpenVINO runs, found [^\n]+; copy the folder again, or export it",
    ):
        ExportedModel(copied, "openvino")


def test_an_exported_model_is_asked_by_openvino_without_torch(on_device, folders, tmp_path, settings):  # noqa: F811
    question = "What is in your left hand?"
    done = on_device("ask", str(folders["float32"]), "picture.jpg", question, "--engine", "openvino")
    assert (done.returncode, done.stderr) == (0, "")
    expected = on_device("ask", str(folders["float32"]), "picture.jpg", question)
    assert done.stdout.splitlines()[-1].split(" s  ")[1] == expected.stdout.splitlines()[-1].split(" s  ")[1]


@pytest.fixture
def without_openvino(monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == "openvino" else object())


def test_without_openvino_it_is_said_how_to_get_it(folders, without_openvino, settings):
    with pytest.raises(UserError, match=r"openvino: expected the engine .*; pip install openvino, or take another"):
        AskedModel(folders["float32"], settings.evaluate, "cpu", "openvino")
    assert AskedModel(folders["float32"], settings.evaluate, "cpu").load_seconds > 0


def test_a_missing_engine_is_said_before_models_are_read(tmp_path, without_openvino, monkeypatch):
    folder = workspace(tmp_path)
    monkeypatch.setattr("stages.check_inputs.fit_by_their_files", lambda _: True)
    monkeypatch.setattr("stages.check_inputs.reads_texts", lambda: False)
    (folder / "data").mkdir(exist_ok=True)
    change(folder, "evaluate", engine="openvino")
    with pytest.raises(UserError, match="openvino: expected the engine that runs exported models, found it missing"):
        run_stage(folder, "check_inputs")
    change(folder, "export", formats=[], teacher=False)
    run_stage(folder, "check_inputs")


@pytest.mark.parametrize("engine", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_a_provider_that_is_not_installed_is_said_before_any_model_is_loaded(tmp_path, folders, monkeypatch, engine):
    monkeypatch.chdir(workspace(tmp_path))
    (tmp_path / "picture.jpg").write_bytes(QUESTIONS[0][0].frames[0])
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError) as error:
        app.run(["ask", str(folders["float32"]), "picture.jpg", "How many?", "--engine", engine])
    provider = {"onnxruntime-cuda": CUDA, "onnxruntime-tensorrt": "TensorrtExecutionProvider"}[engine]
    assert str(error.value).startswith(f"onnxruntime: expected one with {provider}, found {CPU}; pip install ")


def test_onnxruntime_does_not_go_on_with_another_provider(folders, monkeypatch):
    """As it does by itself: here the installed one has no CUDA, elsewhere a library of CUDA's is missing."""
    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime has CUDA")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    with pytest.raises(UserError) as error:
        runtime("onnxruntime-cuda").open(folders["float32"] / DECODER)
    expected = f"{DECODER}: expected a graph that onnxruntime runs, found that {CUDA} did not start, and {CPU} would"
    assert expected in str(error.value)
    assert "; see that there is a GPU (nvidia-smi), and pip install " in str(error.value)


def test_onnxruntime_does_not_go_on_with_another_provider_as_it_answers(folders, monkeypatch):
    graph = runtime("onnxruntime").open(folders["float32"] / DECODER)

    class Failing:
        def __getattr__(self, name):
            return getattr(opened, name)

        def run(self, *_):
            raise EPFail("out of memory")

    opened = graph.session._sess
    monkeypatch.setattr(graph.session, "_sess", Failing())
    monkeypatch.setattr(graph.session, "set_providers", lambda *_: pytest.fail("went on"))
    with pytest.raises(EPFail):
        graph.run(dict.fromkeys(graph.inputs))


def test_an_engine_is_refused_where_no_model_is_exported(tmp_path, source, monkeypatch):
    monkeypatch.chdir(workspace(tmp_path))
    (tmp_path / "picture.jpg").write_bytes(QUESTIONS[0][0].frames[0])
    with pytest.raises(UserError, match="--engine: expected an exported model, such as models/student-onnx, for openv"):
        app.run(["ask", str(source), "picture.jpg", "How many?", "--engine", "openvino"])


@pytest.mark.system
def test_exports_are_measured_in_the_engine_of_params(smoke_copy):
    change(smoke_copy, "evaluate", engine="openvino")
    folder = smoke_copy / "evaluations/student-onnx-w4a8"
    expected = json.loads((folder / "predictions.json").read_text())
    run_stage(smoke_copy, "evaluate", "student-onnx-w4a8")
    performance = json.loads((folder / "performance.json").read_text())
    assert performance["engine"].startswith("OpenVINO 20")
    assert performance["latency_ms_p50"] > 0
    found = json.loads((folder / "predictions.json").read_text())
    assert [one["id"] for one in found] == [one["id"] for one in expected]
    same = sum(one == other for one, other in zip(found, expected, strict=True))
    assert same > 0.7 * len(expected)
