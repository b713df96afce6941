"""Figures of a classification, against hand-made cases, and a whole run over classes."""

import csv
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, STAGES, run_stage, workspace

from firstsight.evaluation.class_quality import (
    calibration_error,
    confusion,
    macro_f1,
    precision_recall_f1,
    summarise_classes,
)
from firstsight.reporting import figures
from firstsight.reporting.comparison import show

CLASSES = ["Film", "Animal", "Plant", "Company"]
TRUTH = ["Film", "Film", "Film", "Animal", "Animal", "Plant"]
PREDICTED = ["Film", "Film", "Animal", "Animal", "Film", "Plant"]


def test_a_row_is_a_true_class_and_a_column_a_predicted_one():
    counts = confusion(CLASSES, TRUTH, PREDICTED)
    assert counts.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_precision_recall_and_f1_are_those_of_each_class():
    found = precision_recall_f1(np.array([[2, 1, 0], [0, 3, 0], [1, 1, 0]]))
    np.testing.assert_allclose(found[0], [2 / 3, 2 / 3, 2 / 3])
    np.testing.assert_allclose(found[1], [3 / 5, 1, 3 / 4])
    assert found[2].tolist() == [0, 0, 0]  # never predicted


def test_classes_that_do_not_occur_are_not_in_the_mean():
    counts = confusion(CLASSES, TRUTH, PREDICTED)
    assert macro_f1(counts) == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    # Predicted in vain, a class counts with 0.
    assert macro_f1(confusion(CLASSES, ["Film"], ["Plant"])) == 0


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy():
    # Of ten at a confidence of 0.8, six are right; of ten at 1, all are.
    right = np.array([1.0] * 6 + [0.0] * 4 + [1.0] * 10)
    confidence = np.array([0.8] * 10 + [1.0] * 10)
    assert calibration_error(right, confidence) == pytest.approx(0.1)
    # Gaps of different signs do not cancel between bins.
    mixed = np.array([1.0, 0.0])
    assert calibration_error(mixed, np.array([0.1, 0.9])) == pytest.approx(0.9)


def test_the_summary_has_an_interval_and_every_class():
    groups = [str(number) for number in range(6)]
    found = summarise_classes(CLASSES, TRUTH, PREDICTED, [0.9] * 6, groups, 200, 0)
    assert found["macro_f1_low"] < found["macro_f1"] < found["macro_f1_high"] <= 1
    assert list(found["by_class"]) == CLASSES
    assert found["by_class"]["Animal"] == {"questions": 2, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert found["by_class"]["Company"] == {"questions": 0, "precision": 0, "recall": 0, "f1": 0}
    assert found["calibration_error"] == pytest.approx(0.9 - 4 / 6)


def test_the_picture_of_a_confusion_has_a_panel_a_variant(tmp_path):
    counts = confusion(CLASSES, TRUTH, PREDICTED)
    figures.confusion({"teacher": counts}, CLASSES, tmp_path / "one.png")
    figures.confusion({"teacher": counts, "student": counts}, CLASSES, tmp_path / "two.png")
    sizes = [figures.Image.open(tmp_path / name).size for name in ("one.png", "two.png")]
    assert sizes[1][1] == pytest.approx(2 * sizes[0][1], abs=2)


@pytest.mark.system
@pytest.mark.slow
def test_the_smoke_preset_of_text_runs_through_every_stage(tmp_path, monkeypatch, capsys):
    folder = workspace(tmp_path, "text-smoke")
    (folder / "data").mkdir()
    shutil.copy(ROOT / "data/classes.csv", folder / "data")
    for stage in STAGES:
        run_stage(folder, *stage)
    predictions = json.loads((folder / "evaluations/student-distilled/predictions.json").read_text())
    assert {one["answer"] for one in predictions} <= {"animal", "plant", "vehicle"}
    assert all(1 / 3 <= one["confidence"] <= 1 for one in predictions)
    quality = json.loads((folder / "metrics/quality.json").read_text())
    for variant in ("teacher", "student", "student-finetuned", "student-distilled", "student-nf4"):
        row = quality[variant]
        assert 0 <= row["macro_f1_low"] <= row["macro_f1"] <= row["macro_f1_high"] <= 1
        assert {name: one["questions"] for name, one in row["by_class"].items()} == dict.fromkeys(
            ("animal", "plant", "vehicle"), 8
        )
        recalls = [one["recall"] for one in row["by_class"].values()]
        assert row["exact_match"] == pytest.approx(np.mean(recalls))  # classes are equally frequent
        assert "teacher_agreement" in row
    with (folder / "metrics/plots/confusion.csv").open(newline="") as file:
        counted = Counter()
        for one in csv.DictReader(file):
            counted[one["variant"]] += int(one["questions"])
    assert set(counted.values()) == {24}
    page = (folder / "metrics/report.html").read_text()
    assert "Which classes are taken for which" in page
    assert "<td>of class plant</td><td>24</td>" in page
    assert "Classes, student-distilled" in (folder / "metrics/summary.txt").read_text()
    monkeypatch.chdir(folder)
    show()
    assert f"{quality['student-distilled']['macro_f1']:.3f}" in capsys.readouterr().out
