"""The comparison table of variants that were measured without a report."""

from conftest import ROOT

from firstsight.core.files import read_json, write_json
from firstsight.reporting.comparison import show, show_some
from firstsight.reporting.text_table import size


def test_of_some_variants_it_has_the_weights_in_memory_and_no_empty_retention(tmp_path, monkeypatch, capsys):
    names = list(read_json(ROOT / "metrics/performance.json", "report"))[:2]
    for name in names:
        (tmp_path / "evaluations" / name).mkdir(parents=True)
        for table in ("quality", "performance"):
            figures = read_json(ROOT / "metrics" / f"{table}.json", "report")[name]
            figures.pop("retention", None)  # which evaluate does not know
            write_json(tmp_path / "evaluations" / name / f"{table}.json", figures)
    monkeypatch.chdir(tmp_path)
    show_some(names)
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert "weights" in header
    assert "retention" not in header
    for name, line in zip(names, lines, strict=True):
        weights = read_json(ROOT / "metrics/performance.json", "report")[name]["weights_bytes"]
        assert line.startswith(name)
        assert line.count(size(weights)) >= 1


def test_of_classes_it_says_accuracy_and_nothing_of_images(tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics").mkdir()
    for name in ("quality.json", "performance.json", "summary.txt"):
        (tmp_path / "metrics" / name).write_bytes((ROOT / "metrics" / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    show()
    assert "without looking at" in capsys.readouterr().out
    quality = read_json(ROOT / "metrics/quality.json", "report")
    for row in quality.values():
        row["macro_f1"] = 0.5
    write_json(tmp_path / "metrics/quality.json", quality)
    show()
    printed = capsys.readouterr().out
    assert "here accuracy, with its 95% interval" in printed
    assert "F1 is macro-F1" in printed
    assert "the image" not in printed
