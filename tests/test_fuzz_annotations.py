"""Damaged annotation files of every source: each is read, or refused in one line that names it."""

import copy
import csv
import io
import json
import random
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture
from test_fuzz_media import damaged
from test_sources import write_video

from firstsight.assembly.sources import READERS
from firstsight.core.errors import UserError
from firstsight.readers.problems import Problems

pytestmark = pytest.mark.slow

SEEDS = 1000
UID = "09194996-ff4b-4a4f-9800-e8aedc9be7f2"
FOLDER = "scannet-v0/002-scannet-scene0709_00"
# What a value may be, and is not expected to be.
STRANGE = [
    None, True, 0, -1, 7, 1e308, float("nan"), float("inf"), 10**400, [], [None], ["a.jpg", "a.jpg"], [["a"]], {},
    {"a": {}}, "", " ", "\0", "\ud800", "e\u0301\u202e", "a\n\u2028", "A", "a.jpg", "clip.mp4", "../a.jpg", "pipe:0",
    "/etc/passwd", "http://a.org/b.mp4", "file:a.jpg", "." * 300, "|", '"', "x" * 30_000, "<image>", "<|im_end|>",
    "<video>\n<image>",
]  # fmt: skip


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


LINES = [
    {"media": "a.jpg", "question": "What?", "answer": "a cup", "answers": ["cup"], "id": "1", "split": "test"},
    {"media": "clip.mp4", "question": "Which?", "answer": "B", "options": ["x", "y"], "start": 0.5, "end": 1},
    {"media": ["a.jpg", "b.jpg"], "question": "What changed?", "question_type": "change"},
]
LLAVA = [
    {"id": "7", "video": f"{UID}.mp4", "audio": "a.mp3", "conversations": turns("<video>\nA?", "B.", "C?", "D.")},
    {"id": 8, "image": ["a.jpg", "b.jpg"], "conversations": turns("<image>\n<image>\nWhat?", "So.")},
    {"video": f"{UID}.mp4", "start_frame": 2, "end_frame": 8, "conversations": turns("<video>\nWhat?", "So.")},
]
EGOSCHEMA = [{"q_uid": name, "question": "What?"} | {f"option {n}": f"{n}!" for n in range(5)} for name in (UID, "b")]
OPENEQA = [
    {"question_id": "1", "question": "What?", "answer": "a cup", "extra_answers": ["cup"], "category": "object",
     "episode_history": FOLDER},
    {"question_id": "2", "question": "Where?", "answer": "here", "category": "place", "episode_history": "clip"},
]  # fmt: skip
EGOTEMPO = [
    {"question_id": "1", "clip_id": f"{UID}_0.5_1.5", "question_type": "order", "question": "What?", "answer": "a cup"},
    {"question_id": "2", "clip_id": "b_-0.1_1", "question_type": "order", "question": "What?", "answer": "a cup"},
]
OF_THE_HUB = [{"video_idx": UID, "question": "What?", "option": list("vwxyz"), "answer": "1"}]
# Source, name of the file, and its records.
FILES = {
    "jsonl": ("jsonl", "qa.jsonl", LINES),
    "csv": ("csv", "qa.csv", LINES),
    "llava": ("llava", "llava.json", LLAVA),
    "llava lines": ("llava", "llava.jsonl", LLAVA),
    "llava parquet": ("llava", "llava.parquet", LLAVA[:1]),
    "egoschema": ("egoschema", "questions.json", EGOSCHEMA),
    "egoschema parquet": ("egoschema", "egoschema.parquet", OF_THE_HUB),
    "answers of egoschema": ("egoschema", "subset_answers.json", {UID: 1, "b": 4}),
    "videos of egoschema": ("egoschema", "uid_to_ego4d.json", {UID: {"video_uid": "v", "clip_start_sec": 3}}),
    "openeqa": ("openeqa", "open-eqa-v0.json", OPENEQA),
    "egotempo": ("egotempo", "egotempo_openQA.json", {"annotations": EGOTEMPO}),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / FOLDER).mkdir(parents=True)
    write_video(tmp_path / "clip.mp4", 20, size=(64, 48))
    for name in (f"{UID}.mp4", "b.mp4"):
        (tmp_path / name).symlink_to("clip.mp4")
    for name in ("a.jpg", "b.jpg", f"{FOLDER}/0-rgb.png", f"{FOLDER}/1-rgb.png"):
        (tmp_path / name).write_bytes(picture(1, 56, 56))
    return tmp_path


def places(value) -> list[tuple]:
    """Every part of a JSON value: the list or object that it is in, and its index or key."""
    inner = list(value.items() if isinstance(value, dict) else enumerate(value)) if value else []
    below = [place for _, one in inner if isinstance(one, list | dict) for place in places(one)]
    return [(value, key) for key, _ in inner] + below


def changed(records, chance: random.Random):
    """The records with a few parts replaced, left out, renamed or repeated."""
    made = copy.deepcopy(records)
    for _ in range(chance.choice((1, 1, 2, 5))):
        if not (found := places(made)):
            break
        inside, key = chance.choice(found)
        match chance.choice(("replace", "replace", "remove", "rename", "repeat")):
            case "replace":
                inside[key] = copy.deepcopy(chance.choice(STRANGE))
            case "remove":
                del inside[key]
            case "rename" if isinstance(inside, dict):
                inside[str(chance.choice(STRANGE))] = inside.pop(key)
            case _:
                inside[key] = [inside[key], copy.deepcopy(inside[key])]
    return made


def written(name: str, records) -> bytes:
    """The records in the form that the name of their file says; what it cannot hold as text."""
    if name.endswith(".jsonl"):
        return "\n".join(map(json.dumps, records)).encode()
    if name.endswith(".csv"):
        rows = [one if isinstance(one, dict) else {"question": one} for one in records]
        texts = [
            {key: "|".join(map(str, one)) if isinstance(one, list) else one for key, one in row.items()} for row in rows
        ]
        buffer = io.StringIO()
        table = csv.DictWriter(buffer, list(dict.fromkeys(key for row in texts for key in row)))
        table.writeheader()
        table.writerows(texts)
        return buffer.getvalue().encode(errors="replace")
    if name.endswith(".parquet"):
        sink = pa.BufferOutputStream()
        try:
            pq.write_table(pa.Table.from_pylist([one for one in records if isinstance(one, dict)]), sink)
        except (pa.ArrowException, ValueError, OverflowError):
            pq.write_table(pa.table({"id": [json.dumps(one) for one in records]}), sink)
        return sink.getvalue().to_pybytes()
    return json.dumps(records).encode()


def check(source: str, path, data, policy: str) -> None:
    """Read a file, and hold what was read or said of it against what is promised."""
    problems, said = Problems(policy), []
    try:
        with warnings.catch_warnings(action="ignore"):
            for asked in READERS[source](data, problems):
                # All of it is written to a file, in UTF-8.
                f"{asked.record} {asked.record.to_record()} {asked.media and asked.media.key()}".encode()
    except UserError as error:
        said = [str(error)]
    for line in (*said, *problems.first):
        assert str(path.parent) in line or path.name in line
        assert len(line.splitlines()) == 1
        assert len(line) < 1000


@pytest.mark.parametrize("case", FILES)
def test_a_damaged_annotation_file_is_read_or_named(folder, settings, case):
    source, name, records = FILES[case]
    beside = name in ("subset_answers.json", "uid_to_ego4d.json")
    path = folder / ("questions.json" if beside else name)
    if beside:
        path.write_text(json.dumps(EGOSCHEMA))
    data = settings.data.model_copy(update={"source": source, "path": str(path)})
    (folder / name).write_bytes(written(name, records))
    assert list(READERS[source](data, Problems("stop")))
    for seed in range(SEEDS):
        chance = random.Random(f"{case} {seed}")
        content = written(name, changed(records, chance))
        (folder / name).write_bytes(damaged(content, chance) if seed % 3 == 0 else content)
        for policy in ("stop", "skip"):
            try:
                check(source, path, data, policy)
            except BaseException as error:
                error.add_note(f"seed {seed}, {policy}: {(folder / name).read_bytes()[:2000]!r}")
                raise
