"""`firstsight start` at a real pseudo-terminal, and by flags without one."""

import fcntl
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import sys
import termios
from pathlib import Path

import pyte
import pytest
from conftest import ROOT, command, new_project, run_stage, warm, workspace
from PIL import Image
from text_families import ANSWERS, GPT2_POSITIONS, TEXT_SAVE

from firstsight.cli import app
from firstsight.core import params
from firstsight.core.errors import UserError
from firstsight.core.params import Optimisation
from firstsight.planning.shapes import KNOWN
from firstsight.starting import settings as written
from firstsight.starting import sources
from firstsight.starting.choices import ALPHA, DEMOS, METHODS, PAIRS, TEMPERATURE, Choices
from firstsight.starting.records import Found

DOWN, ENTER, CTRL_C, CTRL_D, ERASE = "\x1b[B", "\r", "\x03", "\x04", "\x7f"
FINETUNE = "--approach", "finetune", "--method", "lora", "--student", "openai-community/gpt2", "--data", "qa.jsonl"
COLUMNS, LINES = 100, 200
# Seconds without output after which the command hangs, however busy the machine.
HANGS = 300
COUNTS = {"train": 4000, "validation": 500, "test": 50}
CLASSES = ["animal", "plant", "vehicle"]
PROMPT = "{title}\n{text}\n\nWhich class?"
# What is asked, in order, by the beginning of the question.
APPROACH, METHOD, MODEL, DATA, FILE = "What do you", "By which", "Which model", "Which data", "File (.jsonl"
TEACHER, STUDENT, WRITE, RUN = "Which teacher", "Which student", "Write this", "Run dvc"
LENGTH, SIZE = "How many tokens", "How many training"


def write_questions(path: Path, count: int = 300) -> None:
    asked = [f"After {n} minutes, what is at place {n % 4}?" for n in range(count)]
    rows = [{"question": question, "answer": ANSWERS[n % 4]} for n, question in enumerate(asked)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_texts(path: Path) -> None:
    """Ten articles of WikiText's form, each of twelve paragraphs."""
    lines = []
    for article in range(10):
        lines += ["", f" = Thing {article} = ", ""]
        lines += [f" In place {n} of {article} there is a cup , and a ball beside it . " for n in range(12)]
    path.write_text("\n".join(lines))


def write_rows(path: Path, rows: list[dict]) -> None:
    """Rows of the same columns, as CSV or JSON Lines."""
    lines = [json.dumps(row) for row in rows]
    if path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    path.write_text("".join(f"{line}\n" for line in lines))


def classified(count: int, classes: list[str], key: str = "class") -> list[dict]:
    return [{"title": f"Thing {n}", "year": 1900 + n, key: classes[n % len(classes)]} for n in range(count)]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A repository's root as far as the command reads it, with questions in qa.jsonl."""
    workspace(tmp_path)
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("egoqa", "*targets", "visual*"))
    shutil.copytree(ROOT / "embedded", tmp_path / "embedded")
    write_questions(tmp_path / "qa.jsonl")
    return tmp_path


class Terminal:
    """A command at a pseudo-terminal of its own, whose screen pyte keeps."""

    def __init__(self, folder: Path, *arguments: str):
        environment = {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "PROMPT_TOOLKIT_NO_CPR": "1"}
        # pytest's parallel workers have another width in theirs, which rich prefers to the terminal's.
        environment |= {"COLUMNS": str(COLUMNS), "LINES": str(LINES)}
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            # Here, because the command may look before this process gets to it.
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
            os.chdir(folder)
            words = [sys.executable, "-m", "firstsight", "start", *arguments]
            os.execve(sys.executable, words, os.environ | environment)
        self._screen = pyte.Screen(COLUMNS, LINES)
        self._stream = pyte.ByteStream(self._screen)
        self._unanswered = b""  # what was printed since the last keys

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    def answer(self, question: str, keys: str) -> None:
        """Wait for a question, and type the keys."""
        self.wait(question)
        self._unanswered = b""
        os.write(self._terminal, keys.encode())

    def wait(self, text: str) -> None:
        """Wait for a text that comes after the last keys."""
        while text.encode() not in self._unanswered:
            assert self._read(), f"{text!r} did not come:\n{self.text}"

    def end(self) -> int:
        """Wait for the end, and return the exit status."""
        while self._read():
            pass
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> bool:
        """Take what the command prints next; False at its end."""
        if not select.select([self._terminal], [], [], HANGS)[0]:
            os.kill(self.pid, signal.SIGKILL)
        try:
            printed = os.read(self._terminal, 1 << 16)
        except OSError:  # Linux says the end of a terminal so
            return False
        self._stream.feed(printed)
        self._unanswered += printed
        return bool(printed)


def test_enter_alone_fine_tunes_the_first_model_by_lora(folder):
    old = (folder / "params.yaml").read_bytes()
    terminal = Terminal(folder)
    for question in (APPROACH, METHOD, MODEL, DATA):
        terminal.answer(question, ENTER)
    terminal.answer(FILE, f"qa.jsonl{ENTER}")
    for question in (SIZE, WRITE, RUN):
        terminal.answer(question, ENTER)
    assert terminal.end() == 0, terminal.text
    loaded = params.load(folder / "params.yaml")
    assert (loaded.models.teacher, loaded.models.student.source) == (None, "openai-community/gpt2")
    assert (loaded.train.method, loaded.data.source, loaded.data.path) == ("lora", "jsonl", "qa.jsonl")
    assert loaded.data.train_samples == 200
    assert (folder / "params.yaml.1.bak").read_bytes() == old
    assert "After 1 minutes, what is at place 1?" in terminal.text  # a record as it is read
    assert "fits 24 GiB with" in terminal.text  # the plan
    for command_line in ("dvc repro ", "firstsight table ", "firstsight publish student-finetuned OWNER/NAME"):
        assert f"\n  {command_line}" in terminal.text
    assert not (folder / "models").exists()  # nothing has run


def test_arrow_keys_choose_and_what_cannot_be_used_is_asked_again(folder):
    (folder / "bad.csv").write_text("question,answer\nWhat?,it,more\n")
    terminal = Terminal(folder)
    terminal.answer(APPROACH, DOWN + ENTER)
    terminal.answer(METHOD, 3 * DOWN + ENTER)
    terminal.answer(TEACHER, 4 * DOWN + ENTER)
    terminal.answer(STUDENT, ENTER)  # the teacher's own
    terminal.answer(DATA, ENTER)
    terminal.answer(FILE, f"bad.csv{ENTER}")
    terminal.wait("error: bad.csv: line 2: expected 2 cells, found 3; quote cells that hold commas")
    terminal.answer(DATA, DOWN + ENTER)
    terminal.answer("Temperature T?", f"x{ENTER}")
    terminal.answer("temperature: expected a number, found", 2 * ERASE + "2.5" + ENTER)
    terminal.answer("Alpha?", ENTER)
    terminal.answer(SIZE, f"{3 * ERASE}50{ENTER}")
    terminal.answer(WRITE, ENTER)
    terminal.answer(RUN, "n")
    assert terminal.end() == 0, terminal.text
    loaded = params.load(folder / "params.yaml")
    assert (loaded.models.teacher.source, loaded.models.student.source) == ("embedded/teacher", "embedded/student")
    assert (loaded.train.method, loaded.train.temperature, loaded.train.alpha) == ("full", 2.5, 0.7)
    assert (loaded.data.source, loaded.data.train_samples) == ("synthetic", 50)
    assert not loaded.finetune_teacher.enabled
    assert TEMPERATURE in terminal.text
    assert ALPHA in terminal.text
    assert "image, 84 x 84" in terminal.text


def test_texts_are_shown_as_they_are_read_and_cut_as_asked(folder):
    write_texts(folder / "notes.txt")
    terminal = Terminal(folder, *FINETUNE[:-2])
    terminal.answer(DATA, ENTER)
    terminal.answer(FILE, f"notes.txt{ENTER}")
    terminal.answer(LENGTH, f"{3 * ERASE}1{ENTER}")
    terminal.answer("max-tokens: expected at least 2, found 1", f"{ERASE}128{ENTER}")
    terminal.answer(SIZE, f"{3 * ERASE}40{ENTER}")
    terminal.answer(WRITE, ENTER)
    terminal.answer(RUN, "n")
    assert terminal.end() == 0, terminal.text
    loaded = params.load(folder / "params.yaml")
    assert (loaded.data.source, loaded.data.path, loaded.data.hub) == ("text", "notes.txt", None)
    assert (loaded.data.max_tokens, loaded.data.train_samples) == (128, 40)
    assert (loaded.models.teacher, loaded.train.alpha, loaded.evaluate.continuations) == (None, 0.0, 100)
    assert "left out: 10 heading\n" in terminal.text
    shown = terminal.text.partition("left out")[2].partition(LENGTH)[0]
    assert re.search(r"split +text\n", shown)  # and no prompt
    assert shown.count("there is a cup , and a ball beside it .") == 3
    assert "= Thing" not in shown


def test_classes_are_found_and_asked_for_by_a_template(folder):
    terminal = Terminal(folder, "--approach", "distill", "--method", "full")
    terminal.answer(TEACHER, 3 * DOWN + ENTER)
    terminal.answer(STUDENT, ENTER)  # the encoder that is suggested with it
    terminal.answer(DATA, 4 * DOWN + ENTER)
    terminal.wait("Columns: title, text, class")
    terminal.answer("Prompt?", " {kind}" + ENTER)
    terminal.answer("prompt: expected columns of title, text, class, found 'kind'", 13 * ERASE + "kind?" + ENTER)
    terminal.answer("Temperature T?", ENTER)
    terminal.answer("Alpha?", ENTER)
    terminal.answer(SIZE, ENTER)
    terminal.answer(WRITE, ENTER)
    terminal.answer(RUN, "n")
    assert terminal.end() == 0, terminal.text
    loaded, preset = (params.load(folder / name) for name in ("params.yaml", "presets/dbpedia-bert-tiny.yaml"))
    assert (loaded.data.source, loaded.data.path, loaded.data.hub) == ("csv", "data/classes.csv", None)
    assert (loaded.data.classes, loaded.data.prompt) == (CLASSES, "{title}\n{text}\n\nWhich kind?")
    assert (loaded.targets, loaded.train) == (preset.targets, preset.train)
    assert loaded.models.student.source == "google/bert_uncased_L-2_H-128_A-2"
    assert "3 classes: animal, plant, vehicle\n" in terminal.text
    assert "The oak grows beside the wall." in terminal.text
    assert re.search(r"Which kind\?\n", terminal.text)  # with the template's line feeds


@pytest.mark.parametrize(
    ("arguments", "question", "keys"),
    [((), APPROACH, CTRL_C), (FINETUNE[:-2], FILE, CTRL_C), (FINETUNE[:-2], FILE, CTRL_D), (FINETUNE, SIZE, CTRL_C)],
    ids=["list", "path", "Ctrl-D", "text"],
)
def test_an_interrupt_leaves_everything_as_it_is(folder, arguments, question, keys):
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    terminal = Terminal(folder, *arguments)
    if question == FILE:
        terminal.answer(DATA, ENTER)
    terminal.answer(question, keys)
    assert terminal.end() == 130
    assert "Traceback" not in terminal.text
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("keys", ["n", CTRL_C])
def test_what_is_not_confirmed_is_not_written(folder, keys):
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    terminal = Terminal(folder, *FINETUNE, "--samples", "all")  # so that nothing else is asked
    terminal.answer(WRITE, keys)
    assert terminal.end() == (130 if keys == CTRL_C else 0)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def start(folder, monkeypatch, *arguments: str) -> params.Params:
    monkeypatch.chdir(folder)
    app.run(["start", *arguments, "--yes", "--no-run"])
    return params.load(folder / "params.yaml")


def test_the_commands_line_in_the_file_makes_the_same_file_again(folder, monkeypatch):
    given = ("--approach", "distill", "--teacher", "openai-community/gpt2-medium", "--student", "openai-community/gpt2")
    loaded = start(folder, monkeypatch, *given, "--data", "qa.jsonl", "--temperature", "4", "--alpha", "0.25")
    assert (loaded.train.temperature, loaded.train.alpha, loaded.data.train_samples) == (4.0, 0.25, 200)
    text = (folder / "params.yaml").read_text()
    assert text.startswith("# Distil openai-community/gpt2-medium into openai-community/gpt2 (lora) on qa.jsonl. Made")
    words = shlex.split(text.splitlines()[1].removeprefix("# "))
    assert words[:2] == ["firstsight", "start"]
    start(folder, monkeypatch, *words[2:])
    assert (folder / "params.yaml").read_text() == text
    assert not (folder / "params.yaml.2.bak").exists()  # the same again is no reason for a copy


def test_comments_of_the_preset_stay(folder, monkeypatch):
    start(folder, monkeypatch, *FINETUNE)
    made, preset = ((folder / name).read_text() for name in ("params.yaml", "presets/finetune-gpt2-lora.yaml"))
    body, original = (text[text.index("\nmodels:") :].splitlines() for text in (made, preset))
    changed = {before: after for before, after in zip(original, body, strict=True) if before != after}
    assert {line.split("#")[0].strip() for line in changed.values()} == {"path: qa.jsonl", "train_samples: 200"}
    assert all(before.split("#")[1] == after.split("#")[1] for before, after in changed.items())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "expected --approach, --student, --data, --yes, because there is no terminal to ask at"),
        (["--approach", "distill", "--yes"], "expected --student, --data, --teacher, because --yes asks nothing"),
        ([*FINETUNE, "--yes", "--alpha", "0.5"], "--alpha: expected it with --approach distill alone, found 0.5"),
        (["--temperature", "0"], "temperature: expected at least 0.01, found 0.0"),
        (["--alpha", "1.5"], "alpha: expected at most 1, found 1.5"),
        (["--samples", "some"], "samples: expected a whole number above 0, or all, found 'some'"),
        (["--student", "gpt"], "gpt: expected a folder, or a hub id as owner/name, found neither"),
        (["--student", "data"], "data: expected a model's folder with a config.json, found none in it"),
        (["--teacher", "models/student"], "models/student: expected a source outside the pipeline's own outputs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_are_missing_or_wrong_are_one_line(folder, monkeypatch, arguments, line):
    monkeypatch.chdir(folder)
    before = (folder / "params.yaml").read_bytes()
    with pytest.raises(UserError) as error:
        app.run(["start", *arguments])
    assert line in str(error.value)
    assert (folder / "params.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ("nowhere.jsonl", "data.path: expected a JSON Lines file in UTF-8, found nowhere.jsonl"),
        (
            "notes.md",
            "notes.md: expected a demo (scenes, sciq, wikitext, classes), a hub id as owner/name, or a file that ",
        ),
        ("two.jsonl", "two.jsonl: expected records in every split, found none in "),
        (
            "one.txt",
            "one.txt: expected records in every split, found none in validation, test (train 1, validation 0, test 0), "
            "because all of a group, such as an article of a text file, is in one split; add records",
        ),
        ("open.jsonl", "open.jsonl: expected an answer to every question, found 1 without one"),
        ("scenes", "scenes: expected text alone, because openai-community/gpt2 reads no images, found images or video"),
    ],
)
def test_data_that_cannot_be_used_are_one_line(folder, monkeypatch, data, line):
    write_questions(folder / "two.jsonl", 2)
    (folder / "one.txt").write_text(" = Tea = \n\n A cup of tea . \n")
    shutil.copy(folder / "qa.jsonl", folder / "open.jsonl")
    with (folder / "open.jsonl").open("a") as file:
        file.write('{"question": "And this?"}\n')
    before = (folder / "params.yaml").read_bytes()
    with pytest.raises(UserError) as error:
        start(folder, monkeypatch, *FINETUNE[:-1], data)
    assert line in str(error.value)
    assert (folder / "params.yaml").read_bytes() == before
    assert not list(folder.glob("*.bak")) + list(folder.glob(".*.partial"))


def test_a_model_whose_size_is_not_known_is_no_reason_to_stop(folder, monkeypatch, capsys):
    loaded = start(folder, monkeypatch, *FINETUNE[:4], "--student", "someone/something", "--data", "qa.jsonl")
    assert (loaded.models.student.source, loaded.models.student.revision) == ("someone/something", None)
    assert "no plan" in capsys.readouterr().out


def test_questions_without_an_answer_are_for_the_teacher(folder, monkeypatch):
    with (folder / "qa.jsonl").open("a") as file:
        file.write('{"question": "And this?"}\n')
    given = ("--teacher", "openai-community/gpt2-medium", "--student", "openai-community/gpt2", "--data", "qa.jsonl")
    assert start(folder, monkeypatch, "--approach", "distill", *given).data.unanswered == "teacher"


def test_images_start_from_the_preset_that_reads_them_with_and_without_a_teacher(folder, monkeypatch):
    rows = []
    for number in range(40):
        Image.new("RGB", (64, 64), (6 * number, 0, 0)).save(folder / f"{number}.png")
        rows.append(json.dumps({"media": f"{number}.png", "question": "Which?", "answer": str(number)}))
    (folder / "seen.jsonl").write_text("\n".join(rows))
    pair = PAIRS[2]
    given = ["--student", pair.student, "--data", "seen.jsonl", "--method", "qlora"]
    distilled = start(folder, monkeypatch, "--approach", "distill", "--teacher", pair.teacher, *given)
    original = params.load(folder / "presets/qwen2-vl-7b-24gb.yaml")
    assert distilled.models == original.models  # with their revisions
    assert distilled.train == original.train.model_copy(update={"method": "qlora"})
    alone = start(folder, monkeypatch, "--approach", "finetune", *given)
    assert (alone.models.teacher, alone.train.alpha, alone.evaluate.teacher_methods) == (None, 0.0, [])


def test_columns_of_a_data_set_are_named_by_flags_and_remembered(folder, monkeypatch):
    """A folder of parquet or CSV files is read like a data set of the hub."""
    (folder / "set").mkdir()
    for split, count in (("train", 60), ("test", 20)):
        rows = "".join(f"What is {n} and {split}?,{n}\n" for n in range(count))
        (folder / f"set/{split}.csv").write_text(f"ask,say\n{rows}")
    given = [*FINETUNE[:-1], "set"]
    with pytest.raises(
        UserError, match=r"set: expected a column 'question', 'class' or 'text', found \['ask', 'say'\]"
    ):
        start(folder, monkeypatch, *given)
    fields = ["--field", "question=ask", "--field", "answer=say"]
    loaded = start(folder, monkeypatch, *given, *fields)
    assert loaded.data.hub.model_dump() == {
        "id": "set",
        "config": None,
        "revision": None,
        "splits": {"train": "by group", "test": "test"},
        "fields": {"question": "ask", "answer": "say"},
    }
    assert shlex.join(fields) in (folder / "params.yaml").read_text().splitlines()[1]
    terminal = Terminal(folder, *given)
    terminal.answer("What are the records?", ENTER)
    terminal.answer("Which column holds the question", ENTER)
    terminal.answer("Which column holds the answer", DOWN + ENTER)
    terminal.answer(SIZE, CTRL_C)
    assert terminal.end() == 130
    with pytest.raises(UserError, match="--field answers: expected OURS=THEIRS with OURS one of id, question, "):
        sources.parse_fields(["answers"])


@pytest.mark.parametrize("name", ["texts.csv", "texts.jsonl", "notes.txt", "bodies"])
def test_texts_are_told_by_their_column_and_written_from_their_preset(folder, monkeypatch, name):
    rows = [{"text": f"In place {n} there is a cup.", "group": str(n)} for n in range(120)]
    if name == "bodies":
        (folder / "bodies").mkdir()
        write_rows(folder / "bodies/train.csv", [{"topic": "x", "body": row["text"]} for row in rows])
    elif name == "notes.txt":
        write_texts(folder / name)
    else:
        write_rows(folder / name, rows)
    pair = ["--teacher", PAIRS[0].teacher, "--student", PAIRS[0].student]
    fields = ["--field", "text=body"] if name == "bodies" else []
    loaded = start(folder, monkeypatch, "--approach", "distill", *pair, "--data", name, *fields, "--max-tokens", "64")
    preset = params.load(folder / "presets/wikitext-gpt2.yaml")
    assert loaded.data.max_tokens == 64
    assert loaded.evaluate == preset.evaluate
    assert loaded.train == preset.train.model_copy(update={"method": "lora", "learning_rate": written.ADAPTER_RATE})
    assert not loaded.finetune_teacher.enabled
    if name == "bodies":
        assert loaded.data.hub.fields == {"text": "body"}
    again = shlex.split((folder / "params.yaml").read_text().splitlines()[1].removeprefix("# "))[2:]
    before = (folder / "params.yaml").read_text()
    assert start(folder, monkeypatch, *again) == loaded
    assert (folder / "params.yaml").read_text() == before
    assert (
        start(folder, monkeypatch, *again, "--method", "full").train == preset.train
    )  # adapters alone take larger steps


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "topics", "labelled"])
def test_classes_are_told_by_their_column_and_written_from_their_preset(folder, monkeypatch, name):
    names, fields = ["Film", "MeanOfTransportation", "Animal"], []
    if name == "topics":
        (folder / name).mkdir()
        for split in ("train", "test"):
            rows = [row | {"title": f"{split} {row['title']}"} for row in classified(60, names, "topic")]
            write_rows(folder / name / f"{split}.csv", rows)
        fields = ["--field", "class=topic"]
    elif name == "labelled":
        datasets = pytest.importorskip("datasets")
        # Caches outside of the test's folder would outlive it.
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        (folder / name).mkdir()
        types = {"title": datasets.Value("string"), "year": datasets.Value("int64")}
        features = datasets.Features({**types, "topic": datasets.ClassLabel(names=names)})
        rows = datasets.Dataset.from_list(classified(60, names, "topic"), features=features)
        rows.to_parquet(folder / name / "train.parquet")
    else:
        write_rows(folder / name, classified(60, names))
    given = ["--approach", "distill", "--teacher", PAIRS[3].teacher, "--student", "Qwen/Qwen2.5-0.5B"]
    loaded = start(folder, monkeypatch, *given, "--data", name, *fields, "--method", "full")
    preset = params.load(folder / "presets/dbpedia-qwen.yaml")
    assert loaded.data.classes == (names if name == "labelled" else sorted(names))
    assert loaded.data.prompt == "{title}\n\nWhich class?"  # not of numbers
    assert (loaded.targets, loaded.train, loaded.report) == (preset.targets, preset.train, preset.report)
    assert (loaded.train.best, loaded.targets.over) == ("accuracy", "classes")
    # The data set has a test split of its own.
    assert (loaded.data.validation_fraction, loaded.data.test_fraction) == (0.1, 0.0 if name == "topics" else 0.1)
    before = (folder / "params.yaml").read_text()
    line = before.splitlines()[1].removeprefix("# ")
    assert r"--prompt '{title}\n\nWhich class?'" in line
    assert ("--field class=topic" in line) == (name in ("topics", "labelled"))
    assert start(folder, monkeypatch, *shlex.split(line)[2:]) == loaded
    assert (folder / "params.yaml").read_text() == before


GPT2 = "--approach", "finetune", "--student", "openai-community/gpt2"
EMBEDDED = "--approach", "finetune", "--student", "embedded/student"


@pytest.mark.parametrize(
    ("arguments", "rows", "line"),
    [
        (GPT2, classified(60, ["Film"]), "rows.csv: expected at least two classes, found ['Film']"),
        (
            GPT2,
            classified(60, ["Film", "film"]),
            "rows.csv: expected a wording of its own for each class, found 'Film'",
        ),
        (
            GPT2,
            classified(300, [f"kind {n}" for n in range(201)]),
            "rows.csv: expected at most 200 classes, found 201 (kind 0, kind 1, kind 10, ...); take another column",
        ),
        (
            [*GPT2, "--prompt", "{name}?"],
            classified(60, CLASSES),
            "rows.csv: line 1: expected a column 'name', found ['title', 'year', 'class']; add it, or correct",
        ),
        ([*GPT2, "--prompt", "Which?"], classified(60, CLASSES), "prompt: expected names of columns in braces"),
        (
            GPT2,
            [{"id": n, "class": CLASSES[n % 3]} for n in range(60)],
            "rows.csv: expected a column of text beside the class, found ['id', 'class']; say what is asked",
        ),
        (
            [*GPT2, "--field", "class=kind"],
            classified(60, CLASSES, "kind"),
            "rows.csv: expected a data set of the hub, or the folder of one, with --config or --field, found another",
        ),
        (
            [*GPT2, "--max-tokens", "64"],
            classified(60, CLASSES),
            "--max-tokens: expected it with texts alone, found records of a class in rows.csv; leave it out",
        ),
        (
            [*GPT2, "--prompt", "{text}"],
            [{"text": f"Text {n}."} for n in range(60)],
            "--prompt: expected it with records of a class alone, found texts in rows.csv; leave it out",
        ),
        ([*GPT2, "--max-tokens", "1"], [], "max-tokens: expected at least 2, found 1"),
        (
            ["--approach", "finetune", "--student", PAIRS[3].student],
            [{"text": f"Text {n}."} for n in range(60)],
            "rows.csv: expected records of a class, because google/bert_uncased_L-2_H-128_A-2 is an encoder",
        ),
        (
            EMBEDDED,
            [{"text": f"Text {n}."} for n in range(60)],
            "rows.csv: expected questions, because embedded/student is a vision-language model, found texts",
        ),
    ],
    ids=lambda value: value.partition(": expected ")[2][:30] if isinstance(value, str) else "",
)
def test_texts_and_classes_that_cannot_be_used_are_one_line(folder, monkeypatch, arguments, rows, line):
    write_rows(folder / "rows.csv", rows or classified(60, CLASSES))
    before = (folder / "params.yaml").read_bytes()
    with pytest.raises(UserError) as error:
        start(folder, monkeypatch, *arguments, "--data", "rows.csv")
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert (folder / "params.yaml").read_bytes() == before


@pytest.mark.parametrize("data", ["classes", "notes.txt"])
def test_a_tiny_model_goes_from_the_choices_to_checked_inputs(folder, monkeypatch, settings, processor, data):
    (folder / "gpt2").mkdir()
    TEXT_SAVE["gpt2"](folder / "gpt2", settings, processor)
    write_texts(folder / "notes.txt")
    with (folder / "notes.txt").open("a") as file:
        file.write("\n" + " ".join(f"word {n}" for n in range(GPT2_POSITIONS)))  # more than it has positions for
    loaded = start(folder, monkeypatch, "--approach", "finetune", "--student", "gpt2", "--data", data)
    for stage in (("download_models", "teacher"), ("download_models", "student"), ("build_egoqa_dataset",)):
        run_stage(folder, *stage)
    run_stage(folder, "check_inputs")
    card = json.loads((folder / "data/egoqa/card.json").read_text())
    if data == "classes":
        assert card["classes"] == CLASSES
        assert {name: row["records"] for name, row in card["splits"].items()} == {
            "train": 96,
            "validation": 12,
            "test": 12,
        }
        return
    assert loaded.data.max_tokens == GPT2_POSITIONS
    checked = json.loads((folder / "data/checked.json").read_text())["texts"]
    assert checked["train"]["texts"] == card["splits"]["train"]["records"]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (["train"], {"train": "by group"}),
        (["train", "test"], {"train": "by group", "test": "test"}),
        (["test", "train", "validation"], {"train": "train", "validation": "validation", "test": "test"}),
        (["dev", "validation"], {"dev": "by group", "validation": "validation"}),
    ],
)
def test_splits_that_a_data_set_lacks_are_made_by_group(theirs, ours):
    assert sources.split_names(theirs) == ours


def test_a_trial_limits_the_splits_that_are_larger():
    assert written.limits(None, COUNTS) == dict.fromkeys(("train_samples", "validation_samples", "test_samples"))
    trial = {"train_samples": 200, "validation_samples": 100, "test_samples": None}
    assert written.limits(200, COUNTS) == trial
    assert written.limits(4000, COUNTS) == trial | {"train_samples": None, "validation_samples": 400}


@pytest.mark.parametrize("preset", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("teacher", ["openai-community/gpt2-medium", None])
def test_each_preset_takes_the_choices_and_keeps_its_comments(tmp_path, monkeypatch, preset, teacher):
    if teacher and params.load(preset).models.teacher is None:
        pytest.skip("this preset is for fine-tuning alone")
    monkeypatch.chdir(tmp_path)
    source = {"source": "csv", "path": "a, b.csv"}
    kind = "class" if params.load(preset).targets.over == "classes" else "question"
    if kind == "class":
        source |= {"classes": CLASSES, "prompt": PROMPT}
    taught = ("distill", teacher, 2.0, 0.5) if teacher else ("finetune", None, None, None)
    approach, name, temperature, alpha = taught
    choices = Choices(approach, "adalora", name, "someone/else", "a, b.csv", source, temperature, alpha, kind=kind)
    text = written.with_choices(preset, choices, Found(COUNTS, 0, {}, False, (), (), ()))
    with written.beside(text) as path:
        loaded = params.load(path)
    assert (loaded.models.student.source, loaded.train.method, loaded.data.path) == (
        "someone/else",
        "adalora",
        "a, b.csv",
    )
    comments = [line.partition(" # ")[2] for line in text.splitlines()]
    for line in preset.read_text().partition("\ndata:")[2].splitlines():
        # A data set of the hub has made way for the file.
        assert line.startswith(("    id:", "    splits:", "    fields:")) or line.partition(" # ")[2] in comments


def test_what_is_suggested_can_be_planned_and_is_there():
    for pair in PAIRS:
        for source in (pair.teacher, pair.student):
            assert source in KNOWN or (ROOT / source / "config.json").is_file()
    assert {*METHODS} == {*Optimisation.model_fields["method"].annotation.__args__}
    for demo in DEMOS.values():
        params.Data.model_validate(params.load(ROOT / "presets/smoke.yaml").data.model_dump() | demo.keys)


@pytest.mark.system
@pytest.mark.slow
def test_scripted_to_the_table(settings, processor, tmp_path):
    """On a tiny checkpoint, by flags alone: fine-tuned, measured and compared with what it was before."""
    project = new_project(tmp_path / "project")
    (project / "gpt2").mkdir()
    TEXT_SAVE["gpt2"](project / "gpt2", settings, processor)
    write_questions(project / "qa.jsonl", 120)
    command(project, "git", "init", "--quiet")
    words = ["--approach", "finetune", "--student", "gpt2", "--data", "qa.jsonl", "--samples", "40", "--yes"]
    printed = command(project, sys.executable, "-m", "firstsight", "start", *words, **warm())
    table = printed.partition("Before and after")[2]
    for variant in ("student", "student-finetuned", "student-int8", "student-nf4"):
        assert re.search(rf"^{variant} +[01]\.", table, re.MULTILINE), table
    assert "firstsight publish student-finetuned OWNER/NAME" in table
    assert json.loads((project / "data/egoqa/card.json").read_text())["splits"]["train"]["records"] == 40
