"""The benchmark of language models with published weights, at its smallest scale, with tiny random models."""

import csv
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_module
from safetensors.torch import load_file
from text_families import TEXT_SAVE, save_bert
from transformers import AutoModelForCausalLM

from benchmarks import text, text_dbpedia
from benchmarks.text_dbpedia import Row, Scale, dbpedia, dealt, labelled, mean_gain, worded, zero_shot
from benchmarks.text_models import halved
from benchmarks.text_wikitext import Scale as WikitextScale
from benchmarks.text_wikitext import wikitext
from firstsight.records.parquet import Split


@pytest.fixture
def teacher(settings, processor, tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    TEXT_SAVE["qwen2-base"](folder, settings, processor)
    return folder


def test_a_student_of_half_the_layers_has_every_second_one(teacher, tmp_path):
    halved(teacher, tmp_path / "half")
    whole, half = (AutoModelForCausalLM.from_pretrained(one) for one in (teacher, tmp_path / "half"))
    assert len(half.model.layers) == half.config.num_hidden_layers == -(-len(whole.model.layers) // 2)
    for number, layer in enumerate(half.model.layers):
        expected = whole.model.layers[2 * number].state_dict()
        assert all(value.equal(expected[name]) for name, value in layer.state_dict().items())
    assert half.lm_head.weight.equal(whole.lm_head.weight)
    # The layers' places in a cache are their own.
    ids = torch.tensor([[5, 6, 7]])
    assert half.generate(ids, max_new_tokens=2, do_sample=False).shape[1] >= 4


def test_students_are_compared_in_equal_steps_on_the_same_texts(teacher, tmp_path):
    for name, count in (("valid", 12), ("test", 4)):
        lines = [
            f" = {name} {n} = \n\n The cup number {n} is red , and the {name} is to its left . \n" for n in range(count)
        ]
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    scale = WikitextScale(
        train=8, validation=2, test=4, max_tokens=24, batch_size=2, learning_rate=1e-3, temperatures=(2.0,)
    )
    rows = list(wikitext(tmp_path, teacher, scale))
    assert [row["model"] for row in rows] == ["teacher", "student", "student, fine-tuned", "student, distilled"]
    assert [row["steps"] for row in rows] == [0, 0, 4, 4]
    assert {row["texts"] for row in rows} == {4}
    before, tuned, distilled = (row["perplexity"] for row in rows[1:])
    assert rows[1]["saved"] == 0
    assert rows[2]["saved"] == pytest.approx(before - tuned, abs=1e-3)
    assert rows[3]["saved"] == pytest.approx(tuned - distilled, abs=1e-3)
    assert tuned < before > distilled != tuned
    assert (rows[3]["temperature"], rows[3]["alpha"]) == (2.0, 0.5)


def test_rows_are_dealt_by_class_and_labels_drawn_from_them():
    rows = [Row(f"text {number}", "AB"[number % 2]) for number in range(12)]
    first, second = dealt(rows, (2, 3))
    assert [row.text for row in first] == ["text 0", "text 1", "text 2", "text 3"]
    assert Counter(row.label for row in second) == {"A": 3, "B": 3}
    assert not {row.text for row in first} & {row.text for row in second}
    drawn = [labelled(second, 1, seed) for seed in range(4)]
    for one in drawn:
        assert [row.text for row in one] == [row.text for row in second]
        assert Counter(row.label for row in one) == {"A": 1, "B": 1, "": 4}
        assert all(row.label in {"", other.label} for row, other in zip(one, second, strict=True))
    assert len({tuple(one) for one in drawn}) > 1
    assert worded("MeanOfTransportation") == "Mean of transportation"


def test_the_mean_of_three_gains_has_students_interval():
    row = mean_gain("student", 10, [0.01, 0.02, 0.03])
    assert (row["gain"], row["low"], row["high"]) == (0.02, -0.0048, 0.0448)


def write_dbpedia(folder):
    words = {"Animal": "dog cat hen", "WrittenWork": "book poem play"}
    for name, count in (("train", 8), ("test", 4)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "class"])
            for number in range(count):
                for label, some in words.items():
                    writer.writerow([f"The {name} {number} has a {some.split()[number % 3]} .", label])


def test_the_teacher_as_published_is_asked_by_each_way_of_scoring(teacher, tmp_path, monkeypatch):
    write_dbpedia(tmp_path)
    # Instead of normalising, make one class the best, another for each way.
    chosen = {"sum": [9.0, 0.0], "mean": [0.0, 9.0], "calibrated": [9.0, 0.0]}
    monkeypatch.setattr(
        text_dbpedia, "normalisation", lambda kind, *_: lambda scores: torch.tensor([chosen[kind]] * len(scores))
    )
    rows = list(zero_shot(tmp_path, teacher, Scale(zero_shot=5)))
    assert [(row["class_scores"], row["texts"], row["labels"], row["accuracy"]) for row in rows] == [
        ("sum", 5, 0, 0.6),
        ("mean", 5, 0, 0.4),
        ("calibrated", 5, 0, 0.6),
    ]


def test_students_with_few_labels_are_compared_with_the_teacher_and_without(teacher, tmp_path, monkeypatch):
    run, taught = text_dbpedia.distill.run, []

    def distilled():
        stored = load_file("data/teacher-targets/train-00000.safetensors")
        labels = [record.answer for sample in Split(Path("data/egoqa/train.parquet")) for record in sample.records]
        taught.append((stored["answers"].tolist(), stored["hidden"].argmax(-1).tolist(), labels))
        run()

    monkeypatch.setattr(text_dbpedia.distill, "run", distilled)
    write_dbpedia(tmp_path)
    (encoder := tmp_path / "bert").mkdir()
    save_bert(encoder)
    scale = Scale(teacher_labels=2, pool=4, test=8, labels=(2, 1), draws=1, batch_size=4, epochs=1, decoder_epochs=1)
    rows = list(dbpedia(tmp_path, teacher, encoder, scale))
    assert [(row["model"], row["labels"]) for row in rows] == [
        ("teacher, fine-tuned", 2),
        ("MiniLM, fine-tuned", 2),
        ("MiniLM, distilled", 2),
        ("MiniLM, fine-tuned", 1),
        ("MiniLM, distilled", 1),
        ("half of the teacher, fine-tuned", 2),
        ("half of the teacher, distilled", 2),
    ]
    assert [row["steps"] for row in rows] == [None, 2, 2, 2, 2, 2, 2]
    assert {row["texts"] for row in rows} == {8}
    assert rows[0]["agreement"] == 1
    # Labels are taught where there are any, and the teacher's best class elsewhere.
    names = ["Animal", "Written work"]
    for answers, best, labels in taught:
        assert answers == [names.index(one) if one else other for one, other in zip(labels, best, strict=True)]
    assert [sum(map(bool, labels)) for _, _, labels in taught] == [4, 2, 4]
    assert any(answers != best for answers, best, _ in taught)
    for alone, taught in zip(rows[1::2], rows[2::2], strict=True):
        assert taught["gain"] == pytest.approx(taught["accuracy"] - alone["accuracy"], abs=1e-4)
        assert (alone["temperature"], taught["temperature"], taught["alpha"]) == (None, 1.0, 0.9)


def test_the_command_names_its_parts_and_their_files(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["text", "imagenet"])
    with pytest.raises(text.UserError, match="expected one of dbpedia, dbpedia-zero-shot, wikitext, found 'imagenet'"):
        text.run()
    (tmp_path / "test.csv").touch()
    done = run_module(tmp_path, "benchmarks.text", "dbpedia", str(tmp_path))
    line = f"error: benchmarks.text: expected a folder with train.csv and test.csv, found {tmp_path}; name one\n"
    assert (done.returncode, done.stderr) == (1, line)


def test_rows_are_kept_as_they_come_and_those_of_the_other_part_stay(tmp_path, monkeypatch):
    results = tmp_path / "text.csv"
    results.write_text("part,model,accuracy\nwikitext,teacher,\ndbpedia,old,0.5\n")
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).touch()
    seen = []

    def rows(folder):
        for number in range(2):
            seen.append(text.read())
            yield {"model": f"{folder.name} {number}", "gain": number}

    monkeypatch.setattr(text, "RESULTS", results)
    monkeypatch.setattr("benchmarks.measuring.__file__", str(tmp_path / "measuring.py"))
    monkeypatch.setitem(text.PARTS, "dbpedia", text.Part(("train.csv", "test.csv"), rows))
    monkeypatch.setattr("sys.argv", ["text", "dbpedia", str(tmp_path)])
    text.run()
    assert [row["model"] for row in seen[1]] == ["teacher", f"{tmp_path.name} 0"]
    assert [(row["part"], row["gain"]) for row in text.read()] == [("wikitext", ""), ("dbpedia", "0"), ("dbpedia", "1")]


def test_the_docs_have_the_figures_of_the_results():
    page = (ROOT / "docs/text.md").read_text(encoding="utf-8")
    with (ROOT / "benchmarks/text.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))

    def of(part: str, model: str, **more: str) -> list[dict[str, str]]:
        wanted = {"part": part, "model": model} | more
        return [row for row in rows if wanted.items() <= row.items()]

    def said(row: dict[str, str], key: str, digits: int, low: str = "low", high: str = "high", sign: str = "") -> str:
        value, *between = (f"{float(row[name]):{sign}.{digits}f}" for name in (key, low, high))
        return f"{value} ({between[0]} to {between[1]})"

    for labels in ("10", "1"):
        students = (of("dbpedia", f"MiniLM, {how}", labels=labels) for how in ("fine-tuned", "distilled"))
        cells = [
            ", ".join(f"{Decimal(row['accuracy']).quantize(Decimal('.001'), ROUND_HALF_UP)}" for row in some)
            for some in students
        ]
        (gain,) = of("dbpedia", "MiniLM, distilled - fine-tuned", labels=labels)
        assert f"| {labels} | {' | '.join(cells)} | {said(gain, 'gain', 3, sign='+')} |" in page
    (teacher,) = of("dbpedia", "teacher, fine-tuned")
    assert f"The teacher itself has {said(teacher, 'accuracy', 3)}" in page
    for row in of("dbpedia-zero-shot", "teacher, as published"):
        assert f"| {row['class_scores']} | {said(row, 'accuracy', 3)} |" in page
    saved = "saved", 1, "saved_low", "saved_high"
    names = {"teacher": "", "student, fine-tuned": "", "student, distilled": "T = "}
    for name, by in names.items():
        for row in of("wikitext", name):
            model = f"{name}, {by}{float(row['temperature']):g}" if by else name
            figures = (
                said(row, "perplexity", 1, "perplexity_low", "perplexity_high"),
                f"{float(row['bits_per_byte']):.3f}",
            )
            assert f"| {model} | {' | '.join(figures)} | {said(row, *saved) if by else ''}" in page
