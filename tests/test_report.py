"""The report: what it says is what was measured, and the page works in a browser, wide and narrow."""

import json
import shutil
from collections import Counter

import pytest
from conftest import as_wide_as, run_stage
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from firstsight.core.params import Criteria, Levels
from firstsight.evaluation.metrics import score
from firstsight.records.parquet import Split
from firstsight.reporting.comparison import size
from firstsight.reporting.criteria import conclusions, verdicts

LEVELS = Levels(minimum=1.0, target=2.0, stretch=3.0)
CRITERIA = Criteria(compression=LEVELS, memory_saved=LEVELS, speed_up=LEVELS, retention=LEVELS)


@pytest.mark.parametrize(
    ("figure", "reached"),
    [(0.99, None), (1.0, "minimum"), (1.99, "minimum"), (2.0, "target"), (3.0, "stretch"), (None, None)],
)
def test_a_criterion_is_met_from_its_level_on(figure, reached):
    own = {} if figure is None else {"speed_up": figure}
    performance = {"teacher": {"speed_up": 1.0}, "student": {"speed_up": 9.0}, "student-nf4": own}
    (verdict,) = [one for one in verdicts(CRITERIA, {"student-nf4": {}}, performance) if one.criterion == "speed_up"]
    assert (verdict.variant, verdict.figure, verdict.reached) == ("student-nf4", figure, reached)
    assert verdict.judged() == ("no figure" if figure is None else reached or "not met")
    (line,) = conclusions([verdict])
    assert line == f"student-nf4 meets {'1 of 1 criteria' if reached else '0 of 1 criteria; not speed up'}"


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (1234567, "1.23 MB"), (16.6e9, "16.6 GB")]
)
def test_sizes_are_said_in_three_digits(count, said):
    assert size(count) == said


@pytest.mark.system
def test_what_a_person_keeps_in_metrics_stays_there(smoke_copy):
    (smoke_copy / "metrics/notes.txt").write_text("mine")
    (smoke_copy / "metrics/plots/old.png").write_text("of an earlier run")
    run_stage(smoke_copy, "report")
    assert (smoke_copy / "metrics/notes.txt").read_text() == "mine"
    assert not (smoke_copy / "metrics/plots/old.png").exists()


def leaves(name, value):
    if isinstance(value, dict):
        for key, one in value.items():
            yield from leaves(f"{name}.{key}", one)
    else:
        yield name, value


@pytest.fixture(scope="module")
def reported(smoke, tmp_path_factory):
    """The smoke run, with answers of which the teacher's every second is right and the student's every third."""
    folder = tmp_path_factory.mktemp("reported") / "smoke"
    shutil.copytree(smoke, folder)
    records = [record for sample in Split(folder / "data/egoqa/test.parquet") for record in sample.records]
    for variant, every in (("teacher", 2), ("student-distilled", 3), ("student", 1000)):
        answers = [record.answer if n % every == 0 else '<b>no & "no"' for n, record in enumerate(records)]
        predictions = [{"id": record.id, "answer": text} for record, text in zip(records, answers, strict=True)]
        (folder / f"evaluations/{variant}/predictions.json").write_text(json.dumps(predictions))
        quality = json.loads((folder / f"evaluations/{variant}/quality.json").read_text())
        right = [score(record, text).exact_match for record, text in zip(records, answers, strict=True)]
        quality |= {"exact_match": sum(right) / len(right), "exact_match_low": 0.25, "exact_match_high": 0.75}
        (folder / f"evaluations/{variant}/quality.json").write_text(json.dumps(quality))
    run_stage(folder, "report")
    return folder


@pytest.fixture(params=[1280, 390], ids="{} pixels".format)
def page(browser, reported, request):
    as_wide_as(browser, request.param)
    browser.get_log("browser")  # of pages before this one: reading it empties it
    browser.get((reported / "metrics/report.html").as_uri())
    return browser


def test_nothing_is_missing_or_cut_off(page):
    assert page.get_log("browser") == []
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    broken = "return [...document.images].filter(one => one.loading != 'lazy' && !one.naturalWidth).length"
    assert page.execute_script(broken) == 0
    requests = page.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
    assert [name for name in requests if not name.startswith("data:")] == []


def test_every_figure_is_that_of_the_metrics_files(page, reported):
    shown = page.execute_script(
        "return Object.fromEntries([...document.querySelectorAll('[data-figure]')]"
        ".map(one => [one.dataset.figure, one.textContent]))"
    )
    expected = {
        name: value
        for table in ("quality", "performance")
        for name, value in leaves(table, json.loads((reported / f"metrics/{table}.json").read_text()))
    }
    assert shown.keys() == expected.keys()
    for name, value in expected.items():
        assert float(shown[name].replace(",", "")) == pytest.approx(value, rel=1e-5), name


def test_the_comparison_is_that_of_the_metrics_files(page, reported):
    quality = json.loads((reported / "metrics/quality.json").read_text())
    performance = json.loads((reported / "metrics/performance.json").read_text())
    lines = page.find_elements(By.CSS_SELECTOR, "#comparison + div tr")
    cells = [[cell.text for cell in line.find_elements(By.TAG_NAME, "td")] for line in lines[1:]]
    assert [row[0] for row in cells] == [*performance, "question only", "majority answer"]
    for name, matched, f1, retention, *_, latency, _ in cells[: len(performance)]:
        assert float(matched.split()[0]) == pytest.approx(quality[name]["exact_match"], abs=5e-4)
        assert float(f1) == pytest.approx(quality[name]["f1"], abs=5e-4)
        assert float(retention.rstrip("%")) / 100 == pytest.approx(quality[name]["retention"], abs=5e-4)
        assert float(latency.split()[0]) == pytest.approx(performance[name]["latency_ms_p50"], abs=0.05)


def test_the_gallery_is_filtered_by_who_is_right_and_by_type(page, reported):
    records = [record for sample in Split(reported / "data/egoqa/test.parquet") for record in sample.records]
    outcomes = Counter((n % 2 == 0, n % 3 == 0, record.question_type) for n, record in enumerate(records))
    types = {record.question_type for record in records}

    def shown():
        """Type and text of each card that can be seen."""
        visible = page.execute_script(
            "return [...document.querySelectorAll('#answers .card')].filter(one => one.checkVisibility())"
            ".map(one => [one.querySelector('.type').textContent, one.innerText])"
        )
        assert page.find_element(By.ID, "showing").text == str(len(visible))
        return visible

    outcome, kind = (Select(page.find_element(By.ID, name)) for name in ("by-outcome", "by-type"))
    assert len(shown()) == len(records)  # fewer than the page has room for
    for label, teacher, student in (
        ("student wrong, teacher right", True, False),
        ("student right, teacher wrong", False, True),
        ("both right", True, True),
        ("both wrong", False, False),
    ):
        outcome.select_by_visible_text(label)
        assert len(shown()) == sum(outcomes[teacher, student, one] for one in types), label
        for one in types:
            kind.select_by_visible_text(one)
            found = shown()
            assert len(found) == outcomes[teacher, student, one]
            assert {shown_type for shown_type, _ in found} <= {one}
        kind.select_by_visible_text("all")
    # Another student, which is right about the first question alone.
    Select(page.find_element(By.ID, "student")).select_by_visible_text("student")
    assert len(shown()) == sum(n % 2 == 1 for n in range(len(records)))
    outcome.select_by_visible_text("both right")
    ((_, text),) = shown()
    assert records[0].question in text


def test_answers_are_shown_as_they_are_and_not_as_markup(page):
    card = page.find_elements(By.CSS_SELECTOR, "#answers .card")[1]
    assert '✗ <b>no & "no"' in card.text
    assert card.find_elements(By.TAG_NAME, "b") == []
