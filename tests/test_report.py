"""The report: what it says is what was measured, and the page works in a browser, wide and narrow."""

import json
import re
import shutil
from collections import Counter

import pytest
from conftest import ROOT, YAML_SAFE, as_wide_as, change, command, run_stage
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from firstsight.core import params
from firstsight.core.files import write_json
from firstsight.core.params import Control, Criteria, Levels
from firstsight.core.variants import CONTROL, DISTILLED, LEFT_OUT, STUDENTS
from firstsight.evaluation.metrics import score
from firstsight.records.parquet import Split
from firstsight.records.sample import Record
from firstsight.reporting import comparison
from firstsight.reporting.criteria import conclusions, not_judged, verdicts
from firstsight.reporting.headline import headline
from firstsight.reporting.summary import COSTS, Measured, key_figures, performance_table, quality_table
from firstsight.reporting.text_table import size

LEVELS = Levels(minimum=1.0, target=2.0, stretch=3.0)
CRITERIA = Criteria(gain=LEVELS, retention=LEVELS, compression=LEVELS, weights_saved=LEVELS, speed_up=LEVELS)
LABELS = Control(enabled=True, answers="labels")


@pytest.mark.parametrize(
    ("figure", "reached"),
    [(0.99, None), (1.0, "minimum"), (1.99, "minimum"), (2.0, "target"), (3.0, "stretch")],
)
def test_a_criterion_is_met_from_its_level_on(figure, reached):
    """By the students made by distilling; the others have no levels to meet."""
    performance = {name: {"speed_up": 9.0} for name in ("teacher", "student", CONTROL)}
    performance["student-nf4"] = {"speed_up": figure}
    (verdict,) = verdicts(CRITERIA, {"teacher": {}, "student-nf4": {}}, performance)
    assert (verdict.variant, verdict.figure, verdict.reached) == ("student-nf4", figure, reached)
    assert verdict.judged() == (reached or "not met")
    (line,) = conclusions([verdict])
    assert line == f"student-nf4 meets {'1 of 1 criteria' if reached else '0 of 1 criteria; not speed up'}"


def test_a_criterion_that_is_null_or_has_no_figure_is_not_judged_and_said_in_a_line():
    criteria = CRITERIA.model_copy(update={"speed_up": None})
    quality = {"teacher": {}, DISTILLED: {}}
    found = verdicts(criteria, quality, {DISTILLED: {"speed_up": 9.0, "compression": 2.5}})
    assert [one.criterion for one in found] == ["compression"]
    assert conclusions(found) == [f"{DISTILLED} meets 1 of 1 criteria"]
    gain, retention, speed_up = not_judged(criteria, found, quality)
    assert gain == "gain is not judged, because student-finetuned is left out"
    assert retention == "retention is not judged, because the teacher has no right answer"
    assert speed_up.startswith("speed up is not judged, because report.criteria.speed_up is null: ")
    assert not_judged(CRITERIA, found, quality) == [gain, retention]


def test_the_gain_is_that_of_the_same_questions_and_of_whole_groups():
    """Of four images, each asked about a colour and twice about a number, the control knows 0, 1, 2 and 2 answers.

    The distilled student knows the colour of each and the numbers that the control knows, so that it gains 1 answer of
    3 with each image, however images are drawn. The quantized one knows each colour and no number: it gains 1 and
    loses 0, 1, 2 and 2, so that the means of two images can differ.
    """
    known = [(), (1,), (1, 2), (1, 2)]
    kinds = ("colour", "number", "number")
    asked = [(image, place) for image in range(4) for place in range(3)]
    records = [Record(f"{one}", "What?", "so", ("so",), kinds[one[1]]) for one in asked]

    def answering(right) -> Measured:
        return Measured({}, {}, ["so" if right(image, place) else "no" for image, place in asked])

    variants = {
        "teacher": answering(lambda image, place: True),
        CONTROL: answering(lambda image, place: place in known[image]),
        DISTILLED: answering(lambda image, place: place == 0 or place in known[image]),
        "student-nf4": answering(lambda image, place: place == 0),
    }
    groups = [f"image {image}" for image, _ in asked]
    table = quality_table(variants, records, groups, {}, 3000, 0)
    assert "gain" not in table["teacher"]
    assert "gain" not in table[CONTROL]

    def gain(row):
        return tuple(round(row[name], 6) for name in ("gain", "gain_low", "gain_high"))

    own = table[DISTILLED]
    third = round(1 / 3, 6)
    assert gain(own) == (third, third, third)
    assert {kind: (row["questions"], *gain(row)) for kind, row in own["gain_by_type"].items()} == {
        "colour": (4, 1, 1, 1),
        "number": (8, 0, 0, 0),
    }
    # An image gains 1, 0, -1 or -1 of 3 answers. Of the 256 ways of drawing four, 16 have a sum of -4 (6.25%), and 1
    # of 4 (0.4%), 4 of 3 (1.6%) and 14 of 2 (5.5%): the sums at 2.5% and 97.5% are -4 and 2, of 12 answers.
    assert gain(table["student-nf4"]) == (round(-1 / 12, 6), round(-4 / 12, 6), round(2 / 12, 6))
    del variants[CONTROL]
    assert "gain" not in quality_table(variants, records, groups, {}, 100, 0)[DISTILLED]


def of(gain, low, high):
    own = {"exact_match": 0.841, "questions": 566, "gain": gain, "gain_low": low, "gain_high": high}
    return {"teacher": {}, DISTILLED: own, CONTROL: {"exact_match": 0.841 - gain}}


@pytest.mark.parametrize(
    ("quality", "control", "left_out", "said"),
    [
        (
            of(0.231, 0.19, 0.272),
            LABELS,
            None,
            "Distilling answers 84.1% of 566 test questions exactly, fine-tuning on the labels alone 61.0%: "
            "+23.1 points (95% interval +19.0 to +27.2).",
        ),
        (
            of(0.011, -0.012, 0.034),
            LABELS,
            None,
            "Distilling answers 84.1% of 566 test questions exactly, fine-tuning on the labels alone 83.0%: "
            "+1.1 points (95% interval -1.2 to +3.4), which cannot be told from chance.",
        ),
        (
            of(-0.05, -0.07, -0.03),
            Control(enabled=True, answers="teacher"),
            None,
            "Distilling answers 84.1% of 566 test questions exactly, fine-tuning on the labels and the teacher's "
            "answers 89.1%: -5.0 points (95% interval -7.0 to -3.0).",
        ),
        (
            {"teacher": {}, DISTILLED: {}},
            Control(enabled=False, answers="labels"),
            "control.enabled is false",
            "What distilling adds to fine-tuning on the labels alone is not known, because control.enabled is false; "
            "control.enabled: true in params.yaml measures it.",
        ),
        (
            {"teacher": {}, DISTILLED: {}},
            LABELS,
            "no split has an answer; set control.answers to teacher",
            "What distilling adds to fine-tuning on the labels alone is not known, because no split has an answer; "
            "set control.answers to teacher.",
        ),
    ],
)
def test_one_sentence_says_what_distilling_added(quality, control, left_out, said):
    assert headline(quality, control, left_out) == said


def test_dvc_compares_few_figures_under_short_names():
    good = {"exact_match": 0.8, "gain": 0.2, "gain_low": 0.1, "retention": 0.9, "f1": 0.85}
    fast = {"weights_bytes": 1_600_000, "latency_ms_p50": 12.5, "latency_ms_p90": 14.0}
    variants = ("teacher", "teacher-int8", "teacher-int4", "student", CONTROL, *STUDENTS)  # of exports, nothing
    training = {"distill": {"step": 9, "validation_objective": 0.1, "validation_ce": 0.2, "validation_agreement": 0.95}}
    table = key_figures(dict.fromkeys(variants, good), dict.fromkeys(variants, fast), training)
    student = {"exact_match": 0.8, "gain": 0.2, "retention": 0.9, "megabytes": 1.6, "latency_ms": 12.5}
    assert table == {
        "teacher": {"exact_match": 0.8},
        "finetuned": {"exact_match": 0.8},
        "distilled": student,
        "int8": student,
        "nf4": student,
        "int4": student,
        "training": {"loss": 0.1, "agreement": 0.95},
    }
    assert len(list(leaves("metrics", table))) == 24


def test_exported_students_are_compared_with_the_exported_teacher():
    def measured(latency: float) -> Measured:
        figures = dict.fromkeys(COSTS, 1.0) | {"latency_ms_p50": latency}
        return Measured({"exact_match": 0.5}, figures, [])

    found = {"teacher": 30.0, "teacher-onnx": 8.0, DISTILLED: 25.0, "student-onnx": 2.0, "student-onnx-w4a8": 4.0}
    variants = {name: measured(latency) for name, latency in found.items()}
    table = performance_table(variants)
    speed_ups = {"teacher": 1.0, "teacher-onnx": 1.0, DISTILLED: 1.2, "student-onnx": 4.0, "student-onnx-w4a8": 2.0}
    assert {name: row["speed_up"] for name, row in table.items()} == speed_ups
    criteria, quality = params.load(ROOT / "params.yaml").report.criteria, {"teacher": {}}
    judged = {one.variant: one.reached for one in verdicts(criteria, quality, table) if one.criterion == "speed_up"}
    assert judged == {"student-onnx": "target", "student-onnx-w4a8": "minimum"}
    # Without it they are compared with nothing, and PyTorch's student is judged.
    del variants["teacher-onnx"]
    table = performance_table(variants)
    assert "speed_up" not in table["student-onnx"]
    judged = [one.variant for one in verdicts(criteria, quality, table) if one.criterion == "speed_up"]
    assert judged == [DISTILLED]


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
    """The smoke run, with other answers: right are the teacher's every second, the student's every third, the control's
    every fourth.
    """
    folder = tmp_path_factory.mktemp("reported") / "smoke"
    shutil.copytree(smoke, folder)
    records = [record for sample in Split(folder / "data/egoqa/test.parquet") for record in sample.records]
    for variant, every in (("teacher", 2), (DISTILLED, 3), (CONTROL, 4), ("student", 1000)):
        answers = [record.answer if n % every == 0 else '<b>no & "no"' for n, record in enumerate(records)]
        predictions = [{"id": record.id, "answer": text} for record, text in zip(records, answers, strict=True)]
        (folder / f"evaluations/{variant}/predictions.json").write_text(json.dumps(predictions))
        quality = json.loads((folder / f"evaluations/{variant}/quality.json").read_text())
        right = [score(record, text).exact_match for record, text in zip(records, answers, strict=True)]
        quality |= {"exact_match": sum(right) / len(right), "exact_match_low": 0.25, "exact_match_high": 0.75}
        (folder / f"evaluations/{variant}/quality.json").write_text(json.dumps(quality))
    run_stage(folder, "report")
    return folder


@pytest.fixture(params=[(1280, 800), (390, 844)], ids="{0[0]} x {0[1]} pixels".format)
def page(browser, reported, request):
    as_wide_as(browser, *request.param)
    browser.get_log("browser")  # of pages before this one: reading it empties it
    browser.get((reported / "metrics/report.html").as_uri())
    return browser


def test_nothing_is_missing_or_cut_off(page):
    assert page.get_log("browser") == []
    # The window of a phone grows with what is too wide for it; the width of the document does not.
    assert page.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    broken = "return [...document.images].filter(one => one.loading != 'lazy' && !one.naturalWidth).length"
    assert page.execute_script(broken) == 0
    requests = page.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
    assert [name for name in requests if not name.startswith("data:")] == []


def test_nothing_is_wider_than_the_screen_but_tables_that_scroll(page):
    wide = page.execute_script(
        "return [...document.querySelectorAll('body *')].filter(one => !one.closest('.scroll, pre') &&"
        " one.getBoundingClientRect().right > document.documentElement.clientWidth).map(one => one.outerHTML)"
    )
    assert wide == []


def test_the_first_screen_says_what_distilling_added(page, reported):
    """What was compared, the sentence, the table and the picture: all can be seen without scrolling."""
    shown = {
        name: page.find_element(By.CSS_SELECTOR, name) for name in (".subject", ".headline", "#opening", ".opening img")
    }
    height = page.execute_script("return window.innerHeight")
    assert all(one.rect["y"] + one.rect["height"] <= height for one in shown.values())
    questions = 48
    assert shown[".subject"].text.endswith(f". {questions} test questions.")
    own = json.loads((reported / "metrics/quality.json").read_text())[DISTILLED]
    assert own["gain"] == pytest.approx((16 - 12) / questions)
    ends = f"{100 * own['gain_low']:+.1f} to {100 * own['gain_high']:+.1f}"
    assert shown[".headline"].text == (
        "Distilling answers 33.3% of 48 test questions exactly, fine-tuning on the labels alone 25.0%: +8.3 points "
        f"(95% interval {ends})."
    )
    cells = [row.text.split() for row in shown["#opening"].find_elements(By.TAG_NAME, "tr")]
    assert cells[0] == ["variant", "exact", "match", "gain", "weights", "latency"]
    (row,) = [row for row in cells if row[0] == DISTILLED]
    assert row[1:3] == ["33.3%", "+8.3"]


def test_summary_and_table_say_the_same_sentence(reported, monkeypatch, capsys):
    sentence = "Distilling answers 33.3% of 48 test questions exactly"
    (line,) = [line for line in (reported / "metrics/summary.txt").read_text().splitlines() if sentence in line]
    monkeypatch.chdir(reported)
    comparison.show()
    printed = capsys.readouterr().out
    assert line in printed.splitlines()
    (row,) = [row.split() for row in printed.splitlines() if row.startswith(DISTILLED)]
    assert (row[1], row[3]) == ("0.333", "+0.083")


def test_a_sweep_has_a_row_for_each_experiment(reported):
    own = json.loads((reported / "metrics/quality.json").read_text())[DISTILLED]
    header, row = (reported / "metrics/plots/sweep.csv").read_text().splitlines()
    assert header == "temperature,alpha,exact_match,low,high,control"
    assert [float(cell) for cell in row.split(",")] == [
        3.0,
        0.7,
        own["exact_match"],
        own["exact_match_low"],
        own["exact_match_high"],
        0.25,
    ]


@pytest.mark.system
def test_dvc_draws_the_experiments_of_a_sweep_together(tmp_path):
    """In a repository with the definition of that plot, its template and two commits."""
    (plot,) = [one for one in YAML_SAFE.load(ROOT / "dvc.yaml")["plots"] if "sweep" in one]
    write_json(tmp_path / "dvc.yaml", {"plots": [plot]})
    shutil.copytree(ROOT / ".dvc/plots", tmp_path / ".dvc/plots")
    command(tmp_path, "git", "init", "--quiet")
    (tmp_path / "metrics/plots").mkdir(parents=True)
    for temperature in ("2.0", "10.0"):
        table = f"temperature,alpha,exact_match,low,high,control\r\n{temperature},0.7,0.8,0.75,0.85,0.6\r\n"
        (tmp_path / "metrics/plots/sweep.csv").write_text(table)
        command(tmp_path, "git", "add", "--all")
        author = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        command(tmp_path, "git", *author, "commit", "--quiet", "--message", temperature)
    command(tmp_path, "dvc", "plots", "diff", "HEAD", "HEAD~1", "--out", "drawn")
    (spec,) = re.findall("var spec = (.*);", (tmp_path / "drawn/index.html").read_text())
    rows = json.loads(spec)["data"]["values"]
    assert [(row["rev"], row["temperature"], row["control"]) for row in rows] == [
        ("HEAD", "10.0", "0.6"),
        ("HEAD~1", "2.0", "0.6"),
    ]
    assert "<DVC_" not in spec


def test_without_a_control_the_report_says_why_and_judges_no_gain(smoke_copy):
    change(smoke_copy, "control", enabled=False)
    folder = smoke_copy / "evaluations" / CONTROL
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / LEFT_OUT).write_text('"control.enabled is false"')
    run_stage(smoke_copy, "report")
    summary = (smoke_copy / "metrics/summary.txt").read_text()
    assert "is not known, because control.enabled is false; control.enabled: true in params.yaml measures" in summary
    assert "gain is not judged, because student-finetuned is left out" in summary
    assert "not gain" not in summary
    assert not (smoke_copy / "metrics/plots/gain.png").exists()
    assert "finetuned" not in json.loads((smoke_copy / "metrics/metrics.json").read_text())


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
    for name, matched, gain, f1, retention, *_, latency, _ in cells[: len(performance)]:
        assert float(matched.split()[0]) == pytest.approx(quality[name]["exact_match"], abs=5e-4)
        assert gain == (f"{quality[name]['gain']:+.3f}" if name in STUDENTS else "-")
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
