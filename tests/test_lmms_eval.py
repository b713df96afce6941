"""The files that show lmms-eval the test split, against the pipeline's own questions; lmms-eval is not needed here."""

import io
from pathlib import Path

import av
import datasets
import numpy as np
import pytest
import yaml
from conftest import ROOT
from PIL import Image

from benchmarks.lmms_eval import egoqa
from firstsight.records.parquet import SplitWriter
from firstsight.records.sample import Record, Sample
from stages.evaluate import TEST

TASK = ROOT / "benchmarks/lmms_eval/egoqa.yaml"
OPEN = Record("one-held", "What do I hold?", "a cup", ("a cup", "a mug"), "held object")
CHOICE = Record("one-which", "Which is it?", "B", ("B",), "held object", ("a cup", "a ball"))


def jpeg(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (56, 28), (grey, 200, 40)).save(file, "jpeg")
    return file.getvalue()


SAMPLES = (
    Sample("one", "one", "synthetic", "image", (jpeg(30),), 0.0, (OPEN, CHOICE)),
    Sample("videos/two", "two", "synthetic", "video", (jpeg(30), jpeg(220)), 2.0, (OPEN,)),
)


@pytest.fixture
def documents(tmp_path) -> datasets.Dataset:
    """A split of an image with two questions and a clip with one, as lmms-eval loads and processes it."""
    with SplitWriter(tmp_path / "test.parquet") as writer:
        for sample in SAMPLES:
            writer.write(sample)
    files = {"test": str(tmp_path / "test.parquet")}
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    return egoqa.documents(loaded["test"])


def test_the_task_reads_the_test_split_and_names_functions_that_exist():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: ("function", loader.construct_scalar(node)))
    task = yaml.load(TASK.read_text(encoding="utf-8"), Loader)
    assert (task["dataset_path"], Path(task["dataset_kwargs"]["data_files"]["test"])) == ("parquet", TEST)
    named = [value[1] for value in task.values() if isinstance(value, tuple)]
    assert len(named) == 5
    for name in named:
        module, function = name.split(".")
        assert module == "egoqa"
        assert callable(getattr(egoqa, function)), name


def test_every_question_is_asked_as_evaluate_asks_it(documents):
    assert documents["id"] == ["one-held", "one-which", "one-held"]
    assert [egoqa.prompt(one, {}) for one in documents] == [OPEN.prompt(), CHOICE.prompt(), OPEN.prompt()]
    assert [egoqa.answer(one) for one in documents] == ["a cup", "B", "a cup"]


def test_images_are_given_as_they_are_and_clips_as_files_without_loss(documents):
    (image,) = egoqa.media(documents[0])
    assert np.array_equal(image, SAMPLES[0].images()[0])
    (path,) = egoqa.media(documents[2])
    assert path.endswith(".avi")  # by which lmms-eval knows a video
    with av.open(path) as container:
        assert container.streams.video[0].average_rate == 2
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.array_equal(frames, [np.asarray(frame) for frame in SAMPLES[1].images()])


def test_answers_are_scored_as_evaluate_scores_them(documents):
    held, which, _ = documents
    assert egoqa.scores(held, [" The mug. "]) == {"exact_match": 1.0}
    assert egoqa.scores(held, ["a ball"]) == {"exact_match": 0.0}
    assert egoqa.scores(which, ["B. a ball"]) == {"exact_match": 1.0}
    assert egoqa.scores(which, ["a cup"]) == {"exact_match": 0.0}
