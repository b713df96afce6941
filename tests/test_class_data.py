"""Records of a class: read by a template of the file's columns, split by class, and refused in one line."""

import csv
import json
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, YAML_SAFE, change, make_sample, run_stage, write_params

from firstsight.core import params
from firstsight.core.classes import classes_apart
from firstsight.core.errors import UserError
from firstsight.evaluation.metrics import exact_match
from firstsight.records.parquet import Split, SplitWriter

CLASSES = ["Film", "Animal", "Plant"]
REAL = ROOT.parent / "shared" / "realdata" / "dbpedia"


def workspace(folder, rows, name="records.csv", **data):
    """A folder whose data are these rows, in one of the forms of files."""
    document = YAML_SAFE.load(ROOT / "presets/smoke.yaml")
    document["data"] |= {"source": "jsonl" if name.endswith("jsonl") else "csv", "path": name}
    document["data"] |= {"classes": CLASSES, "prompt": "{title}\n{text}\n\nWhich class?"} | data
    document["data"] |= {"validation_fraction": 0.2, "test_fraction": 0.2} | data
    document["export"]["formats"] = []
    write_params(folder, document)
    if name.endswith("jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif rows:
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return folder


def rows(count=60):
    """Ten records of Film, to each of which there are two of Animal and three of Plant."""
    order = ["Film", "Animal", "Animal", "Plant", "Plant", "Plant"]
    return [{"title": f"Thing {n}", "text": f"It is {n}.", "class": order[n % 6], "extra": "x"} for n in range(count)]


def records(folder, split):
    return [record for sample in Split(folder / f"data/egoqa/{split}.parquet") for record in sample.records]


def built(folder):
    run_stage(folder, "build_egoqa_dataset")
    return {split: records(folder, split) for split in ("train", "validation", "test")}


@pytest.mark.parametrize("name", ["records.csv", "records.jsonl"])
def test_a_template_asks_and_the_class_answers(tmp_path, name):
    found = built(workspace(tmp_path, rows(), name))
    first = "records-2" if name.endswith("csv") else "records-1"
    (record,) = [one for some in found.values() for one in some if one.id == first]
    assert record.question == "Thing 0\nIt is 0.\n\nWhich class?"
    assert (record.answer, record.answers, record.options) == ("Film", ("Film",), ())
    assert record.question_type == "open"
    splits = [Split(tmp_path / f"data/egoqa/{split}.parquet") for split in found]
    assert all(split.classes == tuple(CLASSES) for split in splits)
    neutral = ("N/A\nN/A\n\nWhich class?", "[MASK]\n[MASK]\n\nWhich class?", "Which class?")
    for split in splits:
        assert tuple(one.records[0].question for one in split.content_free) == neutral
    card = json.loads((tmp_path / "data/egoqa/card.json").read_text())
    assert card["classes"] == CLASSES
    assert card["splits"]["test"]["classes"] == {"Animal": 4, "Film": 2, "Plant": 6}


def test_classes_have_their_share_of_each_split_and_sample(tmp_path):
    found = built(workspace(tmp_path, rows(120), train_samples=24))
    counted = {split: Counter(one.answer for one in some) for split, some in found.items()}
    assert counted["train"] == {"Film": 4, "Animal": 8, "Plant": 12}
    assert counted["validation"] == counted["test"] == {"Film": 4, "Animal": 8, "Plant": 12}


def test_classes_have_their_share_of_the_labels(tmp_path):
    found = built(workspace(tmp_path, rows(120), unanswered="teacher", labelled_fraction=0.5))
    assert Counter(one.answer for one in found["train"]) == {"": 36, "Film": 6, "Animal": 12, "Plant": 18}
    assert "" not in {one.answer for split in ("validation", "test") for one in found[split]}


def test_a_hub_data_set_names_its_classes(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    # Caches outside of the test's folder would outlive it.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    label = datasets.ClassLabel(names=CLASSES)
    features = datasets.Features({"label": label, "title": datasets.Value("string"), "text": datasets.Value("string")})
    values = [{"label": CLASSES.index(one["class"]), "title": one["title"], "text": one["text"]} for one in rows()]
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_list(values, features=features).to_parquet(tmp_path / "hub/train.parquet")
    hub = {"id": str(tmp_path / "hub"), "config": None, "revision": None, "splits": {"train": "by group"}}
    hub["fields"] = {"class": "label"}
    folder = workspace(tmp_path, [], source="hub", classes=None, hub=hub, path="params.yaml")
    found = built(folder)
    assert Split(folder / "data/egoqa/train.parquet").classes == tuple(CLASSES)
    assert found["train"][0].question.startswith("Thing ")
    assert Counter(one.answer for one in found["test"]) == {"Film": 2, "Animal": 4, "Plant": 6}
    hub["fields"] = {"class": "title"}
    folder = workspace(tmp_path, [], source="hub", classes=None, hub=hub, path="params.yaml", prompt="{text}")
    with pytest.raises(UserError, match=r"data\.classes: expected the names of the classes, because the column 'tit"):
        built(folder)
    hub["fields"] = {"class": "label"}
    folder = workspace(tmp_path, [], source="hub", hub=hub, path="params.yaml", prompt="{tilte} Which class?")
    with pytest.raises(UserError, match=r"expected the column 'tilte', found \[.*\]; correct data.prompt"):
        built(folder)


def test_a_file_without_classes_has_no_metadata(tmp_path):
    for name, classes in (("none", ()), ("some", CLASSES)):
        with SplitWriter(tmp_path / name, classes) as writer:
            writer.write(make_sample("s", "none", 0, [("Why?", "Film")]))
    assert pq.read_schema(tmp_path / "none").metadata is None
    assert list(pq.read_schema(tmp_path / "some").metadata) == [b"firstsight.classes"]


def with_another_class(found):
    return [one | {"class": "Movie"} if number == 3 else one for number, one in enumerate(found)]


@pytest.mark.parametrize(
    ("change", "settings", "line"),
    [
        (
            with_another_class,
            {},
            r"records.csv: line 5: expected one of the 3 classes of data.classes, found 'Movie'; add it there, or",
        ),
        (
            lambda found: [one | {"class": "Film"} for one in found],
            {},
            r"data.classes: expected records of at least two of the 3 classes, found 1 \(Film\)",
        ),
        (lambda found: found, {"prompt": "{tilte}"}, "line 1: expected a column 'tilte', found .*, or correct data.pr"),
        (
            lambda found: [{"title": one["title"], "text": one["text"]} for one in found],
            {},
            "line 1: expected a column 'class', found",
        ),
        (
            lambda found: [one | {"title": " ", "text": ""} for one in found],
            {},
            "records.csv: line 2: expected text in title or text for data.prompt, found none; remove the record",
        ),
        (lambda found: found, {"prompt": None}, "line 1: expected columns of .*'class'.* found 'title'"),
        (
            lambda found: found,
            {"prompt": None, "classes": None},
            r"line 1: expected columns of .* \(and 'class', where data.classes names the classes\) with commas",
        ),
        (
            lambda found: found,
            {"prompt": "{class} {text}"},
            "data: expected a prompt without the column that has the answer, found {class}; take it out of prompt",
        ),
    ],
)
def test_records_without_a_known_class_are_one_line(tmp_path, change, settings, line):
    folder = workspace(tmp_path, change(rows()), **settings)
    with pytest.raises(UserError, match=line) as error:
        built(folder)
    assert "\n" not in str(error.value)
    assert not (folder / "data/egoqa").exists()


@pytest.mark.parametrize(
    ("classes", "fields", "prompt", "found"),
    [
        (None, {"class": "label"}, "{label}", "label"),
        (None, {"class": "label"}, "{class} {answer}", None),  # columns of the hub's that are called so
        (["right", "wrong"], {}, "{question} {answer}", None),
        (["right", "wrong"], {}, "{question} {class}", "class"),
        (None, {}, "{question} {answer}", "answer"),
    ],
)
def test_a_prompt_does_not_name_the_column_that_has_the_answer(settings, classes, fields, prompt, found):
    values = settings.data.model_dump() | {"source": "csv", "classes": classes, "prompt": prompt}
    if fields:
        hub = {"id": "a/b", "config": None, "revision": None, "splits": {}, "fields": fields}
        values |= {"source": "hub", "hub": hub}
    refused = pytest.raises(ValueError, match=f"the answer, found {{{found}}}; take it out") if found else nullcontext()
    with refused:
        params.Data.model_validate(values)


def test_an_exported_teacher_scores_by_sums(tmp_path):
    workspace(tmp_path, rows())
    change(tmp_path, "targets", over="classes", class_scores="mean")
    change(tmp_path, "export", teacher=True)
    with pytest.raises(UserError, match=r"export.teacher: expected false, because exports score classes by sums"):
        params.load(tmp_path / "params.yaml")


def test_a_key_that_a_line_lacks_is_named(tmp_path):
    given = rows()
    del given[1]["title"]
    with pytest.raises(UserError, match=r"line 2: expected the key 'title', which data\.prompt names, found"):
        built(workspace(tmp_path, given, "records.jsonl"))


@pytest.mark.parametrize(
    "names",
    [
        ["-1", "0", "1"],
        ["A", "B", "The"],
        ["C", "C++", "C#"],
        ["A", "A-", "A+"],
        ["Sci Fi", "Sci-Fi"],
        ["-", "+", "10", "10²", "1.0"],
        ["रस", "रसा"],
    ],
)
def test_names_that_evaluation_tells_apart_are_classes(names):
    assert classes_apart(names) == names
    right = [[exact_match(name, [truth]) for truth in names] for name in names]
    assert right == np.eye(len(names)).tolist()


@pytest.mark.parametrize(
    "names", [["Sci-Fi", "SciFi"], ["U.S.", "us"], ["Caf\u00e9", "cafe\u0301"], ["the Film", "Film!"]]
)
def test_names_that_evaluation_takes_for_one_answer_are_not(names):
    assert exact_match(names[0], names[1:])
    with pytest.raises(ValueError, match="expected a wording of its own for each class, found"):
        classes_apart(names)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"classes": ["Film"]}, "data.classes: expected at least two classes, found ['Film']"),
        (
            {"classes": ["Film", "film ", "Plant"]},
            "data.classes: expected a wording of its own for each class, found 'Film' and 'film '",
        ),
        (
            {"classes": ["The Film", "film"]},
            "data.classes: expected a wording of its own for each class, found 'The Film' and 'film'",
        ),
        ({"classes": ["Film", " "]}, "data.classes: expected a name for each class, found ' '"),
        ({"prompt": "Which class?"}, "data.prompt: expected names of columns in braces, such as {text}, found 'Which"),
        ({"prompt": "{text"}, "data.prompt: expected columns in braces, found '{text' "),
        ({"prompt": "{text.__class__!r}"}, "data.prompt: expected names of columns in braces"),
        ({"source": "llava"}, "data: expected jsonl, csv or hub as source, because classes is set, found llava"),
    ],
)
def test_classes_that_cannot_be_told_apart_are_refused_by_the_parameters(tmp_path, values, line):
    workspace(tmp_path, rows(), **values)
    with pytest.raises(UserError) as error:
        params.load(tmp_path / "params.yaml")
    assert line in str(error.value)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not here")
def test_dbpedia_is_read(tmp_path):
    with (REAL / "test.csv").open(newline="") as file:
        counted = Counter(row["class"] for row in csv.DictReader(file))
    path = str(REAL / "test.csv")
    workspace(tmp_path, [], path, classes=sorted(counted), prompt="{text}\n\nWhich class?", test_samples=140)
    found = built(tmp_path)
    assert sum(map(len, found.values())) > 0.7 * sum(counted.values())
    assert set(Counter(one.answer for one in found["test"]).values()) <= {9, 10, 11}
