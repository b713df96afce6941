"""Texts, which nothing is asked about: read, split, encoded, cut and checked before anything is trained."""

import json
import math
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, STAGES, change, run_stage, workspace
from text_families import DEEPSEEK_TOKENS, TEXT_SAVE, text_workspace

from firstsight.assembly.sources import READERS
from firstsight.core.errors import UserError
from firstsight.core.params import Hub
from firstsight.evaluation.perplexity import summarise_texts
from firstsight.generation.answering import model_inputs
from firstsight.generation.pytorch_model import PyTorchModel
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.packing.pack import IGNORE, encode, pack
from firstsight.planning.workload import workload
from firstsight.publishing.model_card import model_card
from firstsight.readers.problems import Problems
from firstsight.records.parquet import Split, SplitWriter
from firstsight.records.sample import Record, Sample, Text
from firstsight.records.text_loss import TextLoss
from firstsight.reporting.comparison import show, show_some

WIKITEXT = ROOT.parent / "shared/realdata/wikitext-2/valid.txt"
LINES = "\n".join(
    [
        " ",
        " = Homarus = ",
        "",
        " A lobster of 0 @.@ 7 kg , well @-@ known . ",
        " = = Size = = ",
        " A <unk> of it = two cups . ",
        " = = = Of claws = = = ",
        "",
        " = The cup = ",
        " A cup is red . ",
    ]
)


def texts(count: int, split: str = "") -> list[str]:
    things = ("cup", "ball", "plate", "spoon", "book")
    return [
        f"{split} In room {n} the {things[n % 5]} is red, and the {things[n % 3]} is to its left." for n in range(count)
    ]


def sample(name: str, text: str, max_tokens: int | None = None) -> Sample:
    return Sample(name, name, "test", "none", (), 0.0, (Text(name, "", text, (text,), "text", (), max_tokens),))


def read(tmp_path, settings, source, content, problems=None, **values):
    path = tmp_path / f"data.{source}"
    path.write_text(content)
    data = settings.data.model_copy(update={"source": source, "path": str(path), **values})
    return [one.record for one in READERS[source](data, problems or Problems("stop"))]


def test_paragraphs_of_a_text_file_are_records_and_its_articles_groups(tmp_path, settings):
    problems = Problems("stop")
    found = read(tmp_path, settings, "text", LINES, problems)
    assert [(one.id, one.group, one.text) for one in found] == [
        ("data-4", "Homarus", "A lobster of 0 @.@ 7 kg , well @-@ known ."),
        ("data-6", "Homarus", "A <unk> of it = two cups ."),
        ("data-10", "The cup", "A cup is red ."),
    ]
    assert problems.left_out == {"heading": 4}
    assert [one.group for one in read(tmp_path, settings, "text", "one line\r\n\r\n  another\r\n")] == [None, None]


@pytest.mark.skipif(not WIKITEXT.exists(), reason="WikiText-2 is not here")
def test_wikitext_is_read_as_it_was_published(settings):
    data, problems = settings.data.model_copy(update={"source": "text", "path": str(WIKITEXT)}), Problems("stop")
    found = [one.record for one in READERS["text"](data, problems)]
    # 3,760 lines, of which 1,299 are empty.
    assert (len(found), problems.left_out["heading"]) == (1841, 620)
    assert found[0].group == "Homarus gammarus"
    assert not any(one.text.startswith("=") for one in found)


def test_a_text_is_a_key_of_the_other_sources(tmp_path, settings):
    (line,) = read(tmp_path, settings, "jsonl", json.dumps({"text": " A cup. ", "group": "g", "split": "test"}))
    assert (line.text, line.question, line.group, line.split, line.accepted()) == (
        "A cup.",
        "",
        "g",
        "test",
        ("A cup.",),
    )
    first, second = read(tmp_path, settings, "csv", 'text,group\n"A cup, red.",g\nA ball.,\n')
    assert (first.text, first.group, second.text, second.question_type) == ("A cup, red.", "g", "A ball.", "text")
    folder = tmp_path / "hub"
    folder.mkdir()
    pq.write_table(pa.table({"body": ["", " = The cup = \n", " A cup is red . \n", ""]}), folder / "train.parquet")
    hub = {
        "id": str(folder),
        "config": None,
        "revision": None,
        "splits": {"train": "by group"},
        "fields": {"text": "body"},
    }
    data = settings.data.model_copy(update={"source": "hub", "hub": Hub(**hub)})
    problems = Problems("stop")
    (row,) = [one.record for one in READERS["hub"](data, problems)]
    assert (row.text, row.group, problems.left_out) == ("A cup is red .", "The cup", {"empty line": 2, "heading": 1})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "A cup.", "question": "What?"}, "line 1: expected a question or a text, found 'text' and 'question'"),
        ({"text": "A cup.", "answers": ["x"]}, "line 1: expected a question or a text, found 'text' and 'answers'"),
        ({"text": " "}, "line 1: text: expected text that is not empty, found ' '"),
        ({"text": 3}, "line 1: text: expected text, found 3"),
        (
            {"text": "One.<|endoftext|>Two."},
            "line 1: text: expected plain text, found the special token '<|endoftext|>'",
        ),
        ({"text": "A cup.", "media": "data.jsonl.jpg"}, "line 1: expected a text without images and videos"),
    ],
)
def test_a_wrong_text_is_named(tmp_path, settings, line, message):
    (tmp_path / "data.jsonl.jpg").touch()
    with pytest.raises(UserError) as error:
        read(tmp_path, settings, "jsonl", json.dumps(line))
    assert message in str(error.value)


def build(folder, lines, **values):
    """Build the data set of a workspace from a file of texts."""
    (folder / "corpus.txt").write_text("\n".join(lines))
    change(folder, "data", **{"source": "text", "path": "corpus.txt", "labelled_fraction": 1.0} | values)
    run_stage(folder, "build_egoqa_dataset")
    return {split: Split(folder / f"data/egoqa/{split}.parquet") for split in ("train", "validation", "test")}


def test_articles_are_split_alike_every_time_and_none_is_in_two_splits(tmp_path):
    folder, lines = workspace(tmp_path / "w"), []
    for article in range(40):
        lines += [f" = Article {article} = ", *texts(3, f"{article}.")]
    fractions = {"validation_fraction": 0.2, "test_fraction": 0.2}
    first = build(folder, [*lines, lines[1]], max_tokens=20, **fractions)
    groups = {split: {one.group for one in found} for split, found in first.items()}
    assert all(groups.values())
    assert sum(map(len, groups.values())) == len(set.union(*groups.values())) == 40
    assert first["train"][0].records[0].max_tokens == 20
    card = json.loads((folder / "data/egoqa/card.json").read_text())
    # The paragraph that is there twice, in two articles, is kept once.
    assert card["dropped"] == {"duplicate": 1, "heading": 40}
    assert sum(one["records"] for one in card["splits"].values()) == 120
    again = build(folder, [*lines[80:], *lines[:80]], max_tokens=None, **fractions)
    assert {split: {one.group for one in found} for split, found in again.items()} == groups
    assert again["train"][0].records[0].max_tokens is None


@pytest.mark.parametrize(
    ("values", "lines", "message"),
    [
        (
            {"labelled_fraction": 0.5, "unanswered": "teacher"},
            None,
            "data.labelled_fraction: expected 1, because corpus.txt: line 1 is a text",
        ),
        ({"source": "jsonl"}, ['{"text": "a"}', '{"question": "b", "answer": "c"}'], "line 2: expected a text, as at"),
        (
            {"source": "jsonl"},
            ['{"question": "b", "answer": "c"}', '{"text": "a"}'],
            "line 2: expected a question, as at",
        ),
        ({}, [], "corpus.txt: expected a text file, found an empty file"),
        ({}, [" = Title = "], "data: expected records in every split, found none in train"),
    ],
)
def test_a_wrong_file_ends_the_build_with_one_line(tmp_path, values, lines, message):
    folder = workspace(tmp_path / "w")
    with pytest.raises(UserError) as error:
        build(folder, texts(20) if lines is None else lines, **values)
    assert message in str(error.value)
    assert not (folder / "data/egoqa").exists()


BEGIN = {"gpt2": "<|endoftext|>", "qwen2-base": "<|endoftext|>", "qwen2-instruct": "<|endoftext|>"}
BEGIN["deepseek"] = DEEPSEEK_TOKENS[3]
END = BEGIN | {"qwen2-instruct": "<|im_end|>", "deepseek": DEEPSEEK_TOKENS[0]}


@pytest.fixture(scope="module", params=TEXT_SAVE)
def family(request, settings, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    TEXT_SAVE[request.param](folder, settings, processor)
    return request.param, load_processor(folder)


@pytest.fixture(scope="module")
def loaded(family):
    _, processor = family
    return load_model(Path(processor.tokenizer.name_or_path), "float32", "cpu")


def test_a_text_follows_the_begin_token_and_has_an_end_token_unless_it_is_cut(family, tmp_path):
    name, processor = family
    text = texts(1)[0]
    whole = sample("a", text)
    packed = pack(processor, whole, encode(processor, whole, whole.records))
    tokenizer = processor.tokenizer
    assert tokenizer.decode(packed["input_ids"]) == BEGIN[name] + text + END[name]
    assert packed["labels"].tolist() == [IGNORE, *packed["input_ids"].tolist()[1:]]
    assert model_inputs(processor, [(whole, whole.records[0])], "cpu")["input_ids"].tolist() == [
        packed["input_ids"][:1].tolist()
    ]
    cut = sample("a", text, 8)
    short = pack(processor, cut, encode(processor, cut, cut.records))
    assert short["input_ids"].tolist() == packed["input_ids"].tolist()[:8]
    fits = sample("a", text, len(packed["input_ids"]))
    assert pack(processor, fits, encode(processor, fits, fits.records))["input_ids"].equal(packed["input_ids"])
    # The begin token is the same after the processor was saved with a student.
    processor.save_pretrained(tmp_path)
    assert tokenizer.chat_template == load_chat_template(tmp_path)


def load_chat_template(folder):
    return (folder / "chat_template.jinja").read_text()


def test_perplexity_is_that_of_the_loss_of_transformers(family, loaded):
    _, processor = family
    asked = [sample(str(n), text, most) for n, (text, most) in enumerate(zip(texts(6), [None, 8] * 3, strict=True))]
    asked += [sample("é", "Ein schöner Zug", None)]
    found = list(PyTorchModel(loaded, processor, "float32").text_losses([(one, one.records[0]) for one in asked], 3))
    nats = []
    for one, loss in zip(asked, found, strict=True):
        (record,) = one.records
        ids = processor.tokenizer(processor.begin_token + record.answer + processor.tokenizer.eos_token)["input_ids"]
        begins = ids[0] == ids[1]  # DeepSeek's tokenizer adds a begin token of its own
        ids = torch.tensor([ids[begins:][: record.max_tokens]])
        with torch.inference_mode():
            expected = loaded(ids, labels=ids).loss.item()
        assert loss.nats / loss.tokens == pytest.approx(expected, abs=1e-5)
        assert (loss.tokens, loss.cut) == (ids.shape[1] - 1, record.max_tokens is not None)
        read = processor.tokenizer.decode(ids[0, 1:]) if loss.cut else record.answer
        assert loss.bytes == len(read.encode())
        nats.append(expected * loss.tokens)
    figures = summarise_texts(found, [one.group for one in asked], [], 100, 0)
    tokens, size = sum(one.tokens for one in found), sum(one.bytes for one in found)
    assert figures["perplexity"] == pytest.approx(math.exp(sum(nats) / tokens), rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / size, rel=1e-5)
    assert figures["perplexity_low"] < figures["perplexity"] < figures["perplexity_high"]
    assert (figures["texts"], figures["texts_cut"], figures["tokens"], figures["bytes"]) == (7, 3, tokens, size)


def test_continuations_are_compared_with_how_the_texts_go_on():
    text = Text("a", "", "The cup is red and the ball is blue .", (), "text")
    split = text.continued()
    assert (split.question, split.answer) == ("The cup is red and", " the ball is blue .")
    assert Text("a", "", "一二三四", (), "text").continued().question == "一二"
    given = [("g", split, "the ball is green"), ("h", split, "the ball is blue .")]
    figures = summarise_texts([TextLoss(2.0, 3, 4, False)] * 2, ["g", "h"], given, 100, 0)
    # Of 4 words each, 3 are the same; of 3 pairs of words, 2.
    assert figures["rouge_1"] == pytest.approx((0.75 + 1) / 2)
    assert figures["rouge_2"] == pytest.approx((2 / 3 + 1) / 2)
    assert figures["rouge_l"] == pytest.approx((0.75 + 1) / 2)
    assert figures["continuations"] == 2


def test_records_of_texts_are_stored_like_questions_without_one(tmp_path):
    question = Record("q", "What?", "a cup", ("a cup",), "open")
    asked = Sample("q", "q", "test", "none", (), 0.0, (question,))
    for name, most, one in (("a", 7, sample("t", "A cup.", 7)), ("b", None, sample("t", "A cup.")), ("c", None, asked)):
        with SplitWriter(tmp_path / name, max_tokens=most) as writer:
            writer.write(one)
        assert Split(tmp_path / name)[0] == one
    metadata = [pq.read_schema(tmp_path / name).metadata for name in "abc"]
    assert metadata == [{b"firstsight.max_tokens": b"7"}, None, None]


def build_with_a_long_one(folder, count: int, max_tokens: int) -> None:
    """Build a data set of so many texts, and one that is longer than `max_tokens`."""
    fractions = {"test_fraction": 0.2, "validation_fraction": 0.2}
    build(folder, [*texts(count), "red " * 200], unanswered="refuse", max_tokens=max_tokens, **fractions)


@pytest.fixture
def checked(settings, processor, tmp_path):
    """A workspace of texts and a pair of GPT-2, up to what check_inputs reads."""
    folder = text_workspace(tmp_path / "texts", settings, processor, "gpt2", "gpt2")
    build_with_a_long_one(folder, 60, max_tokens=24)
    return folder


def test_what_max_tokens_cuts_is_counted_before_anything_is_trained(checked):
    run_stage(checked, "check_inputs")
    counts = json.loads((checked / "data/checked.json").read_text())["texts"]
    tokenizer = load_processor(checked / "models/student").tokenizer
    for split, count in counts.items():
        lengths = [
            len(tokenizer(one.records[0].answer)["input_ids"]) + 1
            for one in Split(checked / f"data/egoqa/{split}.parquet")
        ]
        assert count == {
            "texts": len(lengths),
            "tokens": sum(min(23, length) for length in lengths),
            "texts_cut": sum(length > 23 for length in lengths),
            "tokens_cut": sum(max(0, length - 23) for length in lengths),
        }
    assert counts["train"]["texts_cut"]


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            "data",
            {"max_tokens": None},
            "tokens, as many as models/teacher has positions for, found 202, 1 of them in its",
        ),
        (
            "export",
            {"formats": ["onnx"]},
            "export.formats and export.teacher: expected [] and false, because the records",
        ),
        ("export", {"teacher": True}, "export.formats and export.teacher: expected [] and false, because the records"),
    ],
)
def test_what_texts_do_not_allow_is_refused_before_anything_is_trained(checked, section, values, message):
    change(checked, section, **values)
    run_stage(checked, "build_egoqa_dataset")
    with pytest.raises(UserError) as error:
        run_stage(checked, "check_inputs")
    assert message in str(error.value)
    assert not (checked / "data/checked.json").exists()


def test_what_texts_take_is_planned_before_they_are_read(settings, tmp_path):
    texts_of = settings.data.model_copy(update={"source": "text", "max_tokens": 200, "train_samples": 5000})
    planned = workload(texts_of, tmp_path / "preset.yaml")
    assert planned.samples["train"] == 5000
    assert (planned.largest.kind, planned.largest.frames, planned.largest.answer_tokens) == ("none", 0, 200)


def test_a_vision_language_model_reads_no_texts(tmp_path):
    folder = workspace(tmp_path / "w")
    for role in ("teacher", "student"):
        run_stage(folder, "download_models", role)
    build(folder, texts(60), unanswered="refuse", test_fraction=0.2, validation_fraction=0.2)
    with pytest.raises(UserError, match=r"models/teacher: expected a language model, because the records are texts"):
        run_stage(folder, "check_inputs")


@pytest.fixture(scope="module")
def distilled(settings, processor, tmp_path_factory):
    """A workspace after all stages: GPT-2 of two layers, fine-tuned on texts, teaches another."""
    folder = text_workspace(tmp_path_factory.mktemp("e2e") / "w", settings, processor, "gpt2", "gpt2")
    build_with_a_long_one(folder, 80, max_tokens=64)
    change(folder, "train", alpha=0.5, temperature=2.0, epochs=3)
    change(folder, "control", enabled=True)
    change(folder, "evaluate", max_new_tokens=8, continuations=4, latency_new_tokens=2, latency_runs=2)
    for stage in STAGES[2:]:
        if stage[0] != "build_egoqa_dataset":
            run_stage(folder, *stage)
    return folder


def test_a_student_is_distilled_on_texts_from_data_to_report(distilled, monkeypatch, capsys):
    quality = json.loads((distilled / "metrics/quality.json").read_text())
    measured = {"teacher", "student", "student-finetuned", "student-distilled", "student-nf4"}
    assert set(quality) == measured
    student, tuned, own = (quality[name] for name in ("student", "student-finetuned", "student-distilled"))
    assert own["perplexity"] < 0.7 * student["perplexity"]
    assert own["perplexity_saved"] == pytest.approx(tuned["perplexity"] - own["perplexity"])
    assert own["perplexity_saved_low"] <= own["perplexity_saved"] <= own["perplexity_saved_high"]
    assert own["continuations"] == 4
    assert {"rouge_1", "rouge_2", "rouge_l", "bits_per_byte_low", "texts_cut"} <= set(own)
    assert not {"exact_match", "f1", "questions", "by_type", "gain", "retention"} & set(own)
    predictions = json.loads((distilled / "evaluations/student-distilled/predictions.json").read_text())
    assert sum("continuation" in one for one in predictions) == 4
    performance = json.loads((distilled / "metrics/performance.json").read_text())
    assert performance["student-distilled"]["latency_ms_p50"] > 0
    figures = json.loads((distilled / "metrics/metrics.json").read_text())
    assert figures["distilled"]["perplexity"] == own["perplexity"]
    monkeypatch.chdir(distilled)
    show()
    printed = capsys.readouterr().out
    assert f"Distilling gives a perplexity of {own['perplexity']:.2f} on " in printed
    assert "bits/byte" in printed
    assert re.search(r"bits/byte +ROUGE-L +parameters", printed)
    assert f"{own['rouge_l']:.3f}" in re.search(r"^student-distilled .*", printed, re.MULTILINE)[0]
    assert "perplexity of a token with its 95% interval, lower is better" in printed
    summary, page = ((distilled / f"metrics/{name}").read_text() for name in ("summary.txt", "report.html"))
    assert "bits per byte" in summary
    # What follows in the page is params.yaml.
    for text in (printed, summary, page.split('id="made-from"')[0]):
        assert not re.search("exact match|test questions|guess|✗ perplexity", text.replace("gain and retention", ""))
    assert "gain and retention are not judged" in summary
    show_some(["student", "student-distilled"])
    assert "perplexity" in capsys.readouterr().out
    card = model_card("student-distilled", "models/student-distilled")
    assert "that continues texts" in card
    assert f"| perplexity of a token | {own['perplexity']:.2f} (" in card
    assert not re.search("[Ee]xact match|questions? ", card.split("## Training")[0])
    exec(card.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out.strip()


def test_all_kinds_of_targets_teach_texts(distilled, tmp_path):
    """Top-k of the whole vocabulary and a teacher that runs in training give the loss of the exact targets."""
    losses = []
    for kind in ("hidden", "topk", "online"):
        folder = Path(shutil.copytree(distilled, tmp_path / kind))
        change(folder, "targets", kind=kind, k=5000)
        change(folder, "train", epochs=1)
        run_stage(folder, "cache_teacher_targets")
        run_stage(folder, "distill")
        losses.append(json.loads((folder / "models/student-distilled/history.json").read_text())[-1]["eval_objective"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)


def test_figures_of_texts_that_are_not_those_of_their_losses_are_refused(distilled, tmp_path):
    folder = Path(shutil.copytree(distilled, tmp_path / "w"))
    path = folder / "evaluations/student/predictions.json"
    rows = json.loads(path.read_text())
    rows[0]["nats"] += 1
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"evaluations/student/quality.json: expected the figures of predictions.json"):
        run_stage(folder, "report")


def test_a_language_model_is_fine_tuned_on_texts_without_a_teacher(distilled, tmp_path):
    folder = Path(shutil.copytree(distilled, tmp_path / "w"))
    change(folder, "models", teacher=None)
    change(folder, "finetune_teacher", enabled=False)
    change(folder, "train", alpha=0.0, epochs=1)
    change(folder, "evaluate", teacher_methods=[], continuations=0)
    for stage in (("download_models", "teacher"), *STAGES[3:]):
        run_stage(folder, *stage)
    quality = json.loads((folder / "metrics/quality.json").read_text())
    before, after = quality["student"], quality["student-finetuned"]
    assert after["perplexity_saved"] == pytest.approx(before["perplexity"] - after["perplexity"])
    assert "rouge_1" not in after
    assert "Fine-tuned, the student has a perplexity of " in (folder / "metrics/summary.txt").read_text()
