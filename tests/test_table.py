"""The comparison table of variants that were measured without a report."""

from conftest import ROOT

from firstsight.core.files import read_json, write_json
from firstsight.reporting.comparison import show_some
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
