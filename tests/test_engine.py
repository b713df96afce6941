"""An exported folder answers as PyTorch does, from the same pixels and tokens, and without torch."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, make_sample, picture, workspace
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from firstsight.asking.asked_model import AskedModel
from firstsight.asking.folder import check_there
from firstsight.asking.question import question_about
from firstsight.cli import app
from firstsight.core.errors import UserError
from firstsight.engine.exported_model import ExportedModel
from firstsight.engine.layout import DECODER, LAYOUT, VERSION, read_layout
from firstsight.engine.pictures import patches
from firstsight.export.folder import export_folders
from firstsight.export.weights import quantize_graphs
from firstsight.generation.answering import answers, generate, model_inputs
from firstsight.readers.image_decoding import encode
from firstsight.records.resizing import fitted_size
from firstsight.records.sample import Sample

ASKED = [("What is in your left hand?", "a cup"), ("How many?", "two"), ("Is there anything blue, or green?", "no")]


def of_size(sample: Sample, *sizes: tuple[int, int]) -> Sample:
    """The sample with frames of these widths and heights, the same one for a video."""
    frames = tuple(picture(number, *size) for number, size in enumerate(sizes))
    return Sample(f"{sample.id} {sizes}", "g", "test", sample.media_kind, frames, sample.fps, sample.records)


IMAGE, FRAMES, VIDEO = (make_sample(kind, kind, 1, ASKED) for kind in ("image", "frames", "video"))
SAMPLES = [
    of_size(IMAGE, (84, 84)),
    of_size(IMAGE, (112, 56)),
    of_size(FRAMES, (84, 84), (56, 112), (84, 84)),
    of_size(VIDEO, *[(84, 56)] * 2),
    of_size(VIDEO, *[(112, 84)] * 5),
    of_size(VIDEO, *[(56, 56)] * 8),
    make_sample("text", "none", 0, ASKED),
]
QUESTIONS = [(sample, record) for sample in SAMPLES for record in sample.records]


@pytest.fixture(scope="module")
def source(tmp_path_factory, model, processor) -> Path:
    """A model folder in PyTorch's format."""
    folder = tmp_path_factory.mktemp("source")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, source) -> Path:
    """The same model, exported with float32 weights. Read only."""
    folder = tmp_path_factory.mktemp("exported")
    export_folders(source, {"float32": folder}, QUESTIONS[:4])
    return folder


@pytest.fixture(scope="module")
def exported(folder) -> ExportedModel:
    return ExportedModel(folder)


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "exported"))


@pytest.mark.parametrize("size", [(84, 84), (112, 56), (57, 100), (30, 200), (300, 200), (17, 19), (640, 480)])
@pytest.mark.parametrize("frames", [0, 1, 2, 5])
def test_pictures_become_the_processors_patches(processor, exported, size, frames):
    """Where they are resized, too, and where the number of frames is odd; 0 stands for an image."""
    pictures = [Image.fromarray(noise(number, *size)) for number in range(max(frames, 1))]
    if frames:
        expected = processor.video_processor([pictures], return_tensors="np", do_sample_frames=False)
        pixels, grid = expected["pixel_values_videos"], expected["video_grid_thw"]
    else:
        expected = processor.image_processor(pictures, return_tensors="np")
        pixels, grid = expected["pixel_values"], expected["image_grid_thw"]
    found = patches(pictures, bool(frames), exported.layout.pictures)
    assert found.grid == tuple(np.asarray(grid)[0])
    np.testing.assert_allclose(found.pixels.reshape(pixels.shape), pixels, rtol=0, atol=1e-5)


def noise(seed: int, width: int, height: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_pictures_are_fitted_as_the_processor_does():
    random = np.random.default_rng(0)
    for height, width in random.integers(1, 3000, (300, 2)).tolist():
        for least, most in ((4 * 28 * 28, 12_544), (100_352, 602_112)):
            if max(height, width) <= 200 * min(height, width):
                assert fitted_size(height, width, 28, least, most) == smart_resize(height, width, 28, least, most)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_images_of_a_data_set_are_resized_as_by_qwen_vl_utils(settings, mode):
    fetch_image = pytest.importorskip("qwen_vl_utils").fetch_image
    for number, size in enumerate([(84, 84), (300, 200), (57, 100), (400, 40)]):
        image = Image.fromarray(noise(number, *size)).convert(mode)
        if mode == "RGBA":
            image.putalpha(Image.linear_gradient("L").resize(size))
        expected = fetch_image({"image": image, "max_pixels": settings.data.max_pixels})
        found = Image.open(io.BytesIO(encode(image, settings.data)))
        assert found.size == expected.size
        expected.save(buffer := io.BytesIO(), "JPEG", quality=settings.data.jpeg_quality)
        assert encode(image, settings.data) == buffer.getvalue()


def test_a_picture_too_long_to_be_seen_is_refused(exported):
    with pytest.raises(UserError, match=r"picture: expected sides that a model can see, found sides of 2010 x 10"):
        patches([Image.new("RGB", (2010, 10))], False, exported.layout.pictures)


@pytest.mark.parametrize("questions", [QUESTIONS[:1], QUESTIONS[-1:], QUESTIONS], ids=["image", "text", "all"])
def test_questions_become_the_processors_tokens_and_the_models_positions(model, processor, exported, questions):
    expected = model_inputs(processor, questions, "cpu")
    batch = exported.inputs(questions)
    np.testing.assert_array_equal(batch.tokens, expected["input_ids"])
    np.testing.assert_array_equal(batch.mask, expected["attention_mask"])
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
    positions, _ = model.model.get_rope_index(**{name: expected[name] for name in names if name in expected})
    np.testing.assert_array_equal(batch.positions * batch.mask, positions * expected["attention_mask"])


@pytest.mark.parametrize("size", [1, 3, 4, len(QUESTIONS)])
def test_answers_are_pytorchs_at_any_batch_size_number_of_frames_and_size(model, processor, exported, size):
    expected = list(answers(model, processor, QUESTIONS, size, 6))
    assert len(set(expected)) > 3
    assert list(exported.answers(QUESTIONS, size, 6)) == expected


@torch.inference_mode()
def test_logits_are_pytorchs(model, processor, exported):
    for questions in ([one] for one in QUESTIONS[::3]), [QUESTIONS]:
        for some in questions:
            expected = model(**model_inputs(processor, some, "cpu")).logits[:, -1]
            np.testing.assert_allclose(exported.first_logits(exported.inputs(some)), expected, rtol=0, atol=1e-3)


def test_an_answer_of_a_given_length_is_pytorchs(model, processor, exported):
    expected = generate(model, model_inputs(processor, QUESTIONS[:1], "cpu"), max_new_tokens=5, min_new_tokens=5)
    found = exported.generate(exported.inputs(QUESTIONS[:1]), 5)
    assert found.shape == (1, 5)
    assert set(found[0]) & set(exported.layout.end_tokens) or found.tolist() == expected.tolist()


def test_an_answer_ends_at_an_end_token(exported, monkeypatch):
    batch = exported.inputs(QUESTIONS[:5])
    whole = exported.generate(batch, 6).tolist()
    ends = (whole[0][1], whole[3][2])
    monkeypatch.setattr(exported, "layout", exported.layout.model_copy(update={"end_tokens": ends}))
    until = [row[: min((row.index(end) for end in ends if end in row), default=6)] for row in whole]
    assert exported.decode(batch, 6) == until


@pytest.mark.parametrize(("weights", "error", "size"), [("int8", 0.05, 0.5), ("w4a8", 0.6, 0.45)])
def test_smaller_weights_compute_nearly_the_same(exported, folder, copied, weights, error, size):
    quantize_graphs(folder, copied, weights)
    smaller = ExportedModel(copied)
    logits = [model.first_logits(model.inputs(QUESTIONS)) for model in (exported, smaller)]
    assert np.linalg.norm(logits[1] - logits[0]) / np.linalg.norm(logits[0]) < error
    bytes_of = [sum(one.stat().st_size for one in place.glob("*.data")) for place in (exported.folder, copied)]
    assert bytes_of[1] < size * bytes_of[0]


def test_what_is_longer_than_the_context_is_refused(exported, monkeypatch):
    monkeypatch.setattr(exported, "layout", exported.layout.model_copy(update={"context": 50}))
    with pytest.raises(
        UserError, match=r"expected at most 50 tokens of media, question and answer, found \d+; shorten"
    ):
        list(exported.answers(QUESTIONS[4 * 3 : 4 * 3 + 1], 1, 20))


def test_a_folder_of_links_is_run(exported, folder, tmp_path):
    """As `dvc checkout` makes it where the cache, in which each file has a folder of its own, is on another disk."""
    (linked := tmp_path / "linked").mkdir()
    for number, path in enumerate(folder.iterdir()):
        (tmp_path / "cache" / str(number)).mkdir(parents=True)
        cached = Path(shutil.copy(path, tmp_path / "cache" / str(number) / "content"))
        (linked / path.name).symlink_to(cached)
    model = ExportedModel(linked)
    shutil.rmtree(tmp_path / "cache")
    assert list(model.answers(QUESTIONS, 4, 6)) == list(exported.answers(QUESTIONS, 4, 6))


def test_weights_outside_of_the_folder_are_not_read(copied):
    """Of a model that others have made."""
    graph = onnx.load(copied / DECODER, load_external_data=False)
    for weights in graph.graph.initializer:
        for entry in weights.external_data:
            if entry.key == "location":
                entry.value = f"../{entry.value}"
    shutil.move(copied / f"{DECODER}.data", copied.parent)
    onnx.save(graph, copied / DECODER)
    with pytest.raises(UserError, match=r"decoder.onnx: expected a graph that onnxruntime runs, found "):
        ExportedModel(copied)


def test_only_the_decoders_threads_wait_actively(folder):
    """With three graphs whose threads do, an answer of small graphs takes twice as long on two cores."""
    model = ExportedModel(folder)
    key = "session.intra_op.allow_spinning"
    for graph in (model._vision, model._embeddings):
        assert graph.session.get_session_options().get_session_config_entry(key) == "0"
    with pytest.raises(RuntimeError, match=key):  # not set: it does
        model._decoder.session.get_session_options().get_session_config_entry(key)


def version_of_another(folder):
    values = json.loads((folder / LAYOUT).read_text())
    (folder / LAYOUT).write_text(json.dumps(values | {"version": VERSION + 1}))
    return f"exported.json: expected version {VERSION}, found {VERSION + 1}; export the model again"


def key_of_another(folder):
    values = json.loads((folder / LAYOUT).read_text())
    (folder / LAYOUT).write_text(json.dumps(values | {"speech": True}))
    return "exported.json: speech: expected a known key, found an unknown one; export the model again"


def no_graph(folder):
    (folder / DECODER).unlink()
    return "expected an exported model, found no decoder.onnx; copy the folder again, or export it again"


def half_a_graph(folder):
    (folder / DECODER).write_bytes((folder / DECODER).read_bytes()[:500])
    return "decoder.onnx: expected a graph that onnxruntime runs, found "


def no_weights(folder):
    (folder / f"{DECODER}.data").unlink()
    return "decoder.onnx: expected a graph that onnxruntime runs, found "


def no_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    return "expected a tokenizer and a chat template, found "


@pytest.mark.parametrize(
    "damage", [version_of_another, key_of_another, no_graph, half_a_graph, no_weights, no_tokenizer]
)
def test_a_folder_that_cannot_be_run_is_refused_in_one_line(copied, damage):
    expected = damage(copied)
    with pytest.raises(UserError) as error:
        ExportedModel(copied)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_without_the_engine_it_is_said_how_to_get_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime: expected the engine .* pip install -r requirements-device.txt"):
        ExportedModel(folder)


# As sitecustomize.py in a folder of PYTHONPATH, Python runs it in every process: only these are found, of packages.
DEVICE = """
import sys
from importlib.machinery import PathFinder

class Absent(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ModuleNotFoundError(name, name=name.split(".")[0])
        return None

sys.meta_path.insert(0, Absent)
"""
ABSENT = {
    *("torch", "torchvision", "transformers", "accelerate", "safetensors", "peft", "bitsandbytes", "datasets"),
    *("onnx", "onnxscript", "pandas", "pyarrow", "matplotlib", "dvc", "sacrebleu", "rouge_score", "qwen_vl_utils"),
}


def without_torch(folder: Path) -> dict[str, str]:
    """Return the environment of processes that find neither torch nor transformers, by a file in `folder`."""
    (folder / "sitecustomize.py").write_text(DEVICE.replace("{absent}", repr(ABSENT)))
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


@pytest.fixture
def on_device(tmp_path):
    """Run `firstsight` where torch and transformers are not installed."""
    environment = without_torch(tmp_path)
    (tmp_path / "picture.jpg").write_bytes(picture(0, 112, 84))
    workspace(tmp_path)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        words = [sys.executable, "-m", "firstsight", *arguments]
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


def test_an_exported_model_is_asked_without_torch(on_device, folder, source, tmp_path, settings):
    done = on_device("ask", str(folder), "picture.jpg", "What is in your left hand?")
    assert (done.returncode, done.stderr) == (0, "")
    sample = question_about(tmp_path / "picture.jpg", "What is in your left hand?", settings.data)
    answer = AskedModel(source, settings.evaluate, "cpu").answer(sample).line()
    assert done.stdout.splitlines()[-1].endswith(f" s  {answer}")


@pytest.mark.parametrize("size", [100, -100])
def test_weights_that_are_not_all_of_one_export_are_refused_before_they_are_loaded(copied, size):
    check_there(copied)
    weights = copied / f"{DECODER}.data"
    os.truncate(weights, weights.stat().st_size + size)
    with pytest.raises(
        UserError, match=r"expected [\d,]+ bytes of weights .* found [\d,]+; the copy is not complete, or"
    ):
        check_there(copied)


def test_another_model_says_that_it_needs_torch(on_device, source):
    done = on_device("ask", str(source), "picture.jpg", "What?")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"error: torch: expected what runs {source}, found it missing; pip install -r r")


def test_exported_and_other_models_are_asked_side_by_side(folder, source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(workspace(tmp_path))
    monkeypatch.setattr("firstsight.cli.quiet.quiet_transformers", lambda: None)
    (tmp_path / "picture.jpg").write_bytes(picture(0, 112, 84))
    app.run(["ask", str(folder), "picture.jpg", "How many?", "--compare", str(source)])
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.split(" s  ")[1] == second.split(" s  ")[1]


def test_an_export_records_how_it_compared(folder):
    layout = read_layout(folder)
    assert (layout.check.questions, layout.check.same_answers) == (4, 4)
    assert layout.check.logit_difference < 1e-3
    assert "4 of 4 answers are the original's" in layout.summary()
