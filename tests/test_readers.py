"""Data sets as their authors publish them: the fields that are read, and where media are looked for."""

import hashlib
import json
import os
import pickle
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, picture
from test_sources import brightness, write_video

from firstsight.assembly.assemble import assemble
from firstsight.assembly.sources import READERS
from firstsight.core.errors import UserError
from firstsight.core.params import FileSource, Hub
from firstsight.readers import hub_dataset
from firstsight.readers.choices import chosen, plain_options
from firstsight.readers.media import Files
from firstsight.readers.overlap import video_ids
from firstsight.readers.problems import BadRecordError, Problems
from firstsight.records.parquet import Split

REAL = ROOT.parent / "shared" / "realdata"
UID, OTHER = "09194996-ff4b-4a4f-9800-e8aedc9be7f2", "1261ee8c-80fc-4a3f-9dd3-29f4a918a9fe"


def read(source, settings, path, content=None, problems=None, **data):
    """Questions of a file, which is written first where content is given."""
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    data = settings.data.model_copy(update={"source": source, "path": str(path)} | data)
    return list(READERS[source](data, problems or Problems("stop")))


def refused(source, settings, path, content, **data):
    """What is said of the one record of a file; nothing else is wrong with it."""
    problems = Problems("skip")
    assert read(source, settings, path, content, problems, **data) == []
    assert problems.count == 1
    return problems.first[0]


def real(name):
    path = REAL / name
    return pytest.param(path, marks=pytest.mark.skipif(not path.exists(), reason=f"{path} is not here"))


def test_every_source_has_a_reader():
    assert set(READERS) == {"synthetic", "hub", *FileSource.__args__}


@pytest.mark.parametrize("source", ["llava", "egoschema", "openeqa"])
@pytest.mark.parametrize(
    ("content", "message"), [("[1", "found Expecting"), ("{", "found '{'"), ('["x"]', "expected a JSON object, found")]
)
def test_broken_json_is_named(settings, tmp_path, source, content, message):
    with pytest.raises(UserError) as error:
        read(source, settings, tmp_path / "qa.json", content)
    assert str(error.value).startswith(str(tmp_path / "qa.json"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_parquet_file_of_other_bytes_is_named(settings, tmp_path):
    pq.write_table(pa.table({"conversations": pa.array([b"\xc4("]).view(pa.string())}), tmp_path / "qa.parquet")
    with pytest.raises(UserError, match=r"qa\.parquet: expected LLaVA's conversations, found 'utf-8' codec"):
        read("llava", settings, tmp_path / "qa.parquet")


# LLaVA


@pytest.fixture
def egoit(tmp_path):
    """Folders as in EgoIT-99K."""
    for name in ("Ego4d", "Ego4d_clip", "HoloAssist/image"):
        (tmp_path / name).mkdir(parents=True)
    for name in (f"Ego4d/{UID}.mp4", f"Ego4d_clip/{UID}-4.mp4", f"Ego4d_clip/{OTHER}-19.mp4"):
        write_video(tmp_path / name)
    for name in ("R015-7July-Switch_short_42.jpg", "R015-7July-Switch_short_43.jpg"):
        (tmp_path / "HoloAssist/image" / name).write_bytes(picture(1))
    return tmp_path


def turns(*texts):
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


QUESTION = turns("<image>\n<speech>\n\nWhat do I hold?\nA. a cup\nB. a ball", "A")
IMAGES = ["HoloAssist/image/R015-7July-Switch_short_42.jpg", "HoloAssist/image/R015-7July-Switch_short_43.jpg"]


def test_egoit_is_read(settings, egoit):
    records = [
        {
            "id": "7",
            "video": f"Ego4d/{UID}.mp4",
            "audio": f"Ego4d_audio/{UID}.mp3",
            "conversations": QUESTION + turns("<audio>And <video> then?", "I put it down."),
        },
        {"id": "7", "video": f"Ego4d_clip/{UID}-4.mp4", "conversations": QUESTION},
        {"id": 8, "image": IMAGES[0], "video": None, "conversations": QUESTION, "dimensions": ["896", "504"]},
        {"image": IMAGES, "conversations": turns("<image>\n<image>\nWhat changed?", "Nothing.")},
        {"id": "9", "image": IMAGES[:1], "conversations": QUESTION},
        {"id": "10", "conversations": turns("Hello?", "Hello.")},
    ]
    problems = Problems("stop")
    found = read("llava", settings, egoit / "EgoIT.json", records, problems)
    assert problems.left_out == {"audio track": 1}
    assert [one.record.id for one in found] == ["7", "7-1", "7-record-2", "8", "EgoIT-4", "9", "10"]
    assert found[0].record.question == "What do I hold?\nA. a cup\nB. a ball"
    assert (found[0].record.accepted(), found[0].record.options) == (("A",), ())
    assert (found[1].record.question, found[1].record.answer) == ("And\nthen?", "I put it down.")
    assert found[1].media == found[0].media == Files("video", egoit, (f"Ego4d/{UID}.mp4",))
    assert [one.record.group for one in found] == [UID, UID, UID, None, None, None, None]
    kinds = [one.media and (one.media.kind, len(one.media.names)) for one in found[3:]]
    assert kinds == [("image", 1), ("frames", 2), ("image", 1), None]

    lines = "\n".join(map(json.dumps, records))
    other = read("llava", settings, egoit / "EgoIT.json", lines)
    assert [(one.record.question, one.media) for one in other] == [(one.record.question, one.media) for one in found]

    rows = [{"id": str(record.get("id", "")), "video": record.get("video"), "audio": record.get("audio"),
             "conversations": record["conversations"]} for record in records[:2]]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), egoit / "train.parquet")
    other = read("llava", settings, egoit / "train.parquet")
    assert [(one.record.question, one.media) for one in other] == [
        (one.record.question, one.media) for one in found[:3]
    ]


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ({"start_frame": 10, "end_frame": 30, "fps": 20.0, "start_time": "0.5", "end_time": "1.5"}, (1.0, 3.0)),
        ({"start_frame": 10, "end_frame": 20, "current_observation_frame": 36}, (1.0, 3.6)),
        ({"start_frame": 10, "end_frame": 20, "current_observation_frame": 5}, (1.0, 2.0)),
        ({"start_time": "0.5", "end_time": "1.5"}, (0.0, None)),
    ],
)
def test_llava_windows_are_counted_in_the_video_s_frames(settings, egoit, window, expected):
    record = {"video": f"Ego4d/{UID}.mp4", "conversations": QUESTION} | window
    (asked,) = read("llava", settings, egoit / "ADL.json", [record])
    assert (asked.media.start, asked.media.end) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": turns("a?", "b", "c?")}, "of human and gpt in turn, found ['human', 'gpt', 'human']"),
        ({"conversations": QUESTION[::-1]}, "found ['gpt', 'human']"),
        ({"conversations": [{"from": "system", "value": "x"}, *QUESTION]}, "found ['system', "),
        ({"conversations": []}, "expected conversations of human and gpt in turn"),
        ({"conversations": 3}, "expected conversations of human and gpt in turn"),
        ({"conversations": ["a", "b"]}, "found [None, None]"),
        ({"conversations": turns("<image>\n", "x")}, "question: expected text that is not empty, found '"),
        ({"conversations": turns("a?", "")}, "answer: expected text that is not empty, found '"),
        ({"conversations": turns("a?", "b", "c?", " ")}, "answer: expected text that is not empty, found '"),
        ({"conversations": [{"from": "human"}, QUESTION[1]]}, "question: expected a value"),
        ({"conversations": turns("a?", "an <image>")}, "expected plain text, found the special token '<image>'"),
        ({"video": None, "audio": "x.mp3"}, "expected an image or a video, found audio alone"),
        ({"image": IMAGES[0]}, "expected an image or a video, found image and video"),
        ({"video": {"path": "x"}}, "video: expected a path"),
        ({"video": 0}, "video: expected a path"),
        (
            {"image": IMAGES[0], "images": IMAGES[:1], "video": None},
            "expected an image or a video, found image and images",
        ),
        # A place without a medium, and other numbers of both.
        ({"video": None}, "found 1 of these and 0 media under image, images, video, videos"),
        ({"video": ""}, "found 1 of these and 0 media under image, images, video, videos"),
        ({"video": None, "images": []}, "found 1 of these and 0 media under image, images, video, videos"),
        ({"video": None, "clip": f"Ego4d/{UID}.mp4"}, f"found 'Ego4d/{UID}.mp4' under 'clip'; rename the key"),
        ({"video": None, "conversations": turns("Hello?", "Hi.", "And <video>?", "x")}, "found 1 of these and 0 media"),
        ({"conversations": turns("<image><video> What?", "x")}, "found 2 of these and 1 media under video"),
        ({"video": None, "image": IMAGES}, "found 1 of these and 2 media under image"),
        (
            {"video": None, "images": IMAGES[:1], "conversations": turns("<image><image>?", "x")},
            "2 of these and 1 media",
        ),
        (
            {"video": None, "image": IMAGES, "conversations": turns("<image>a?", "x", "<image><image>b?", "x")},
            "found 3 of these and 2 media under image",
        ),
        ({"video": "Ego4d/gone.mp4"}, "expected a media file, found no"),
        ({"video": "../../x.mp4"}, "expected media below"),
        ({"start_frame": 30, "end_frame": 30}, "expected start_frame before end_frame, found 30 and 30"),
        ({"start_frame": 3}, "expected start_frame before end_frame, found 3 and None"),
        ({"start_frame": 1, "end_frame": "9"}, "expected start_frame before end_frame"),
        ({"start_frame": 1, "end_frame": 10**400}, "expected start_frame before end_frame, found 1 and 1000"),
    ],
)
def test_a_llava_record_is_refused_whole(settings, egoit, change, message):
    record = {"id": "1", "video": f"Ego4d/{UID}.mp4", "conversations": QUESTION} | change
    said = refused("llava", settings, egoit / "EgoIT.json", [record])
    assert said.startswith(f"{egoit / 'EgoIT.json'}: record 1: ")
    assert message in said


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"images": IMAGES[:1], "conversations": QUESTION}, [("image", 1)]),
        ({"images": IMAGES[0], "conversations": QUESTION}, [("image", 1)]),
        ({"videos": [f"Ego4d/{UID}.mp4"], "conversations": turns("<video>\nWhat?", "x")}, [("video", 1)]),
        ({"images": [], "video": "", "image": None, "conversations": turns("Hello?", "Hi.")}, [None]),
        ({"image": IMAGES, "conversations": turns("What changed?", "x")}, [("frames", 2)]),
        ({"image": IMAGES, "conversations": turns("<video>\nWhat?", "x")}, [("frames", 2)]),
        ({"video": IMAGES, "conversations": turns("<image>\nWhat?", "x", "Why?", "x")}, [("frames", 2)] * 2),
        ({"image": IMAGES, "conversations": turns("<image><image>a?", "x", "b?", "x")}, [("frames", 2)] * 2),
        # Of images that come turn by turn, a question knows those before it.
        ({"image": IMAGES, "conversations": turns("<image>a?", "x", "b <image>?", "x")}, [("image", 1), ("frames", 2)]),
        ({"image": IMAGES[0], "conversations": turns("<image>a?", "x", "<image>b?", "x")}, [("image", 1)] * 2),
    ],
)
def test_media_of_llava_are_read_as_the_text_places_them(settings, egoit, record, expected):
    found = read("llava", settings, egoit / "x.json", [record])
    assert [one.media and (one.media.kind, len(one.media.names)) for one in found] == expected
    assert all("<" not in one.record.question for one in found)


CASES = ROOT.parent / "shared" / "cases" / "llava"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("images-key.json", None),
        ("videos-key.json", "expected a media file, found no"),
        ("no-key.json", "found 1 of these and 0 media under image, images, video, videos"),
    ],
)
def test_records_of_newer_tools_are_read_or_refused(settings, name, message):
    if not CASES.exists():
        pytest.skip(f"{CASES} is not here")
    problems = Problems("skip")
    found = read("llava", settings, CASES / name, problems=problems)
    assert (len(found), problems.count) == ((15, 0) if message is None else (14, 1))
    assert message is None or "json: record 15: " in problems.first[0]
    assert message is None or message in problems.first[0]


def test_a_video_is_known_by_its_name_where_that_is_a_link(settings, egoit):
    """As in the hub's cache, where the file itself is called by its checksum."""
    (egoit / "blobs").mkdir()
    (egoit / f"Ego4d/{UID}.mp4").rename(egoit / "blobs/0a1b")
    (egoit / f"Ego4d/{UID}.mp4").symlink_to("../blobs/0a1b")
    (asked,) = read("llava", settings, egoit / "x.json", [{"video": f"Ego4d/{UID}.mp4", "conversations": QUESTION}])
    assert (asked.media.names, asked.media.kind, asked.record.group) == (("blobs/0a1b",), "video", UID)
    assert video_ids(asked.media.titles()) == {UID}


@pytest.mark.parametrize("answer", [{"from": "gpt", "value": None}, {"from": "gpt"}])
def test_a_llava_answer_may_be_absent(settings, egoit, answer):
    """For the teacher to give; assembly refuses it otherwise."""
    record = {"video": f"Ego4d/{UID}.mp4", "conversations": [QUESTION[0], answer]}
    (asked,) = read("llava", settings, egoit / "EgoIT.json", [record])
    assert asked.record.accepted() == ()


# EgoSchema

Q_UIDS = [f"0074f737-11cb-497d-8d07-77c3a812739{n}" for n in range(3)]


@pytest.fixture
def egoschema(tmp_path):
    """Three questions, of which the first and the last have public answers."""
    questions = [
        {"q_uid": uid, "google_drive_id": "15yG", "question": f"What does C do in {uid[-1]}?"}
        | {f"option {n}": f"C does {n}." for n in range(5)}
        for uid in Q_UIDS
    ]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    (tmp_path / "subset_answers.json").write_text(json.dumps({Q_UIDS[0]: 3, Q_UIDS[2]: 0}))
    window = {"video_uid": UID, "starting_sec": 240, "ending_sec": 420}
    (tmp_path / "uid_to_ego4d.json").write_text(json.dumps({Q_UIDS[0]: window}))
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / f"{Q_UIDS[0]}.mp4", frames=10)
    for uid in Q_UIDS[1:]:
        write_video(tmp_path / "videos" / f"{uid}.mp4", frames=10)
    return tmp_path


def test_egoschema_is_read(settings, egoschema):
    problems = Problems("stop")
    first, last = read("egoschema", settings, egoschema / "questions.json", problems=problems)
    assert problems.left_out == {"question without a public answer": 1}
    assert (first.record.id, first.record.question) == (Q_UIDS[0], "What does C do in 0?")
    assert first.record.options == tuple(f"C does {n}." for n in range(5))
    assert (first.record.accepted(), last.record.accepted()) == (("D",), ("A",))
    assert (first.record.group, last.record.group) == (UID, None)
    assert first.record.question_type == "egoschema"
    assert (first.media.names, last.media.names) == ((f"{Q_UIDS[0]}.mp4",), (f"videos/{Q_UIDS[2]}.mp4",))
    assert first.record.place.endswith("questions.json: record 1")
    assert last.record.place.endswith("questions.json: record 3")


def test_egoschema_without_its_answers_is_unanswered(settings, egoschema):
    (egoschema / "subset_answers.json").unlink()
    found = read("egoschema", settings, egoschema / "questions.json")
    assert [one.record.answer for one in found] == [None] * 3


def test_egoschema_s_parquet_is_read(settings, egoschema, tmp_path):
    options = [f"{letter}. C does {n}." for n, letter in enumerate("ABCDE")]
    rows = [
        {"question_idx": "6", "question": "What?", "video_idx": uid, "option": options, "answer": answer}
        for uid, answer in zip(Q_UIDS, ("3", "0", "4"), strict=True)
    ]
    (tmp_path / "Subset").mkdir()
    path = tmp_path / "Subset" / "test-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = read("egoschema", settings, path, media_root=str(egoschema))
    assert [one.record.accepted() for one in found] == [("D",), ("A",), ("E",)]
    assert found[0].record.options == tuple(f"C does {n}." for n in range(5))
    assert found[1].media.names == (f"videos/{Q_UIDS[1]}.mp4",)
    path.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"parquet: expected EgoSchema's questions, found"):
        read("egoschema", settings, path)


@pytest.mark.parametrize(
    ("change", "answers", "message"),
    [
        ({}, {Q_UIDS[0]: 5}, "expected the answer to be an index of 5 options, from 0, found 5"),
        ({}, {Q_UIDS[0]: -1}, "expected the answer to be an index of 5 options, from 0, found -1"),
        ({"option": ["a", "b"]}, {Q_UIDS[0]: 1}, "expected five options, found"),
        ({"q_uid": 3}, {Q_UIDS[0]: 1}, "q_uid: expected text, found 3"),
        ({"q_uid": ["x" * 9000]}, {Q_UIDS[0]: 1}, "found ['" + "x" * 58 + "; correct it"),
        ({"question": None}, {Q_UIDS[0]: 1}, "question: expected a value"),
        ({"q_uid": Q_UIDS[0][:-1] + "9"}, {Q_UIDS[0][:-1] + "9": 1}, "expected a media file, found no"),
    ],
)
def test_a_question_of_egoschema_is_refused(settings, egoschema, change, answers, message):
    path = egoschema / "questions.json"
    record = json.loads(path.read_text())[0] | change
    (egoschema / "subset_answers.json").write_text(json.dumps(answers | {3: 1}))
    assert message in refused("egoschema", settings, path, [record])


def test_answers_of_another_form_are_refused(settings, egoschema):
    (egoschema / "subset_answers.json").write_text("[]")
    with pytest.raises(UserError, match=r"subset_answers\.json: expected a JSON object by q_uid"):
        read("egoschema", settings, egoschema / "questions.json")


# OpenEQA


def openeqa(**change):
    return {
        "question": "Where is the mirror?",
        "answer": "Next to the staircase",
        "category": "object localization",
        "question_id": "501c3264-ca08-487d-a038-0e83968359f6",
        "episode_history": "scannet-v0/002-scannet-scene0709_00",
        "extra_answers": ["On the wall", "", "by the stairs"],
    } | change


def test_openeqa_is_read_from_frames(settings, tmp_path):
    """Of the frames an extraction leaves among other files, some are taken evenly, the first and the last too."""
    episode = tmp_path / "frames" / openeqa()["episode_history"]
    episode.mkdir(parents=True)
    for n in range(11):
        (episode / f"{n:06d}-rgb.png").write_bytes(picture(n))
        (episode / f"{n:06d}-depth.png").write_bytes(picture(0))
        (episode / f"{n:06d}.txt").write_text("1 0 0 0")
    root = {"media_root": str(tmp_path / "frames"), "max_frames": 4}
    (asked,) = read("openeqa", settings, tmp_path / "open-eqa-v0.json", [openeqa()], **root)
    assert asked.record.accepted() == ("Next to the staircase", "On the wall", "by the stairs")
    assert asked.record.id == openeqa()["question_id"]
    assert (asked.record.question_type, asked.record.group) == ("object localization", "scannet-scene0709")
    assert asked.media.kind == "frames"
    assert [Path(name).name for name in asked.media.names] == [f"{n:06d}-rgb.png" for n in (0, 3, 7, 10)]
    assert len(asked.media.load(settings.data).frames) == 4
    (asked,) = read("openeqa", settings, tmp_path / "open-eqa-v0.json", [openeqa()], **root | {"max_frames": 99})
    assert len(asked.media.names) == 11


@pytest.mark.parametrize(
    "names",
    [
        [f"{n}-rgb.png" for n in range(12)],
        ["frame_1.jpg", "frame_2.jpg", "frame_09.jpg", "frame_010.jpg", "frame_10.jpg", "frame_100.jpg"],
        ["a1_9.png", "a1_10.png", "a2_1.png", "a10_1.png", "b.png"],
        ["9.JPG", "10.jpg", "11.jpeg", "x.png"],
        ["1_1638.2.png", "1_1638.10.png", "2_5.png", "²_5.png"],
    ],
)
def test_frames_of_openeqa_are_in_the_order_of_their_numbers(settings, tmp_path, names):
    episode = tmp_path / openeqa()["episode_history"]
    episode.mkdir(parents=True)
    for name in (*names[::-1], "._1.png"):
        (episode / name).write_bytes(picture(1))
    (asked,) = read("openeqa", settings, tmp_path / "open-eqa-v0.json", [openeqa()], max_frames=99)
    assert [Path(name).name for name in asked.media.names] == names


def test_openeqa_is_read_from_frames_of_other_names_or_videos(settings, tmp_path):
    (tmp_path / "scannet-v0" / "002-scannet-scene0709_00").mkdir(parents=True)
    for name in ("b.JPG", "a.jpg", "notes.txt"):
        (tmp_path / "scannet-v0" / "002-scannet-scene0709_00" / name).write_bytes(picture(1))
    write_video(tmp_path / "scannet-v0" / "002-scannet-scene0709_01.mp4")
    write_video(tmp_path / "000-hm3d-BFRyYbPCCPE.mp4")
    episodes = [
        "scannet-v0/002-scannet-scene0709_00",
        "scannet-v0/002-scannet-scene0709_01",
        "hm3d-v0/000-hm3d-BFRyYbPCCPE",
    ]
    records = [openeqa(episode_history=one, question_id=one) for one in episodes]
    found = read("openeqa", settings, tmp_path / "open-eqa-v0.json", records)
    assert [one.media.names for one in found] == [
        (f"{episodes[0]}/a.jpg", f"{episodes[0]}/b.JPG"),
        (f"{episodes[1]}.mp4",),
        ("000-hm3d-BFRyYbPCCPE.mp4",),
    ]
    assert [one.record.group for one in found] == ["scannet-scene0709", "scannet-scene0709", "hm3d-BFRyYbPCCPE"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "expected frames in scannet-v0/002-scannet-scene0709_00/, or else: expected a media file, found no"),
        ({"episode_history": None}, "episode_history: expected text, found None"),
        ({"episode_history": ["x" * 9000]}, "found ['" + "x" * 58 + "; correct it"),
        ({"episode_history": "/"}, "episode_history: expected text, found '/'"),
        ({"episode_history": "../.."}, "expected media below"),
        ({"answer": 3}, "answer: expected text"),
        ({"extra_answers": "On the wall"}, "answers: expected a list"),
        ({"extra_answers": [3]}, "answers.0: expected text"),
        ({"question_id": None}, "id: expected a value"),
    ],
)
def test_a_question_of_openeqa_is_refused(settings, tmp_path, change, message):
    assert message in refused("openeqa", settings, tmp_path / "open-eqa-v0.json", [openeqa(**change)])


# EgoTempo


def egotempo(clip=f"{UID}_1.0_3.5", **change):
    record = {
        "question_id": f"{clip}_0",
        "clip_id": clip,
        "question_type": "action sequence",
        "question": "What does the person do first?",
        "answer": "They open the door.",
    } | change
    return {"info": {"release date": "19.03.2025", "version": "1.0"}, "annotations": [record]}


@pytest.mark.parametrize(
    ("clip", "there", "expected"),
    [
        (f"{UID}_1.0_3.5", f"{UID}.mp4", (1.0, 3.5)),
        (f"{UID}_1.0_3.5", f"{UID}_1.0_3.5.mp4", (0.0, None)),
        (f"{UID}_-0.10553267045454545_3", f"{UID}.mp4", (0.0, 3.0)),
    ],
)
def test_egotempo_is_read_from_clips_or_whole_videos(settings, tmp_path, clip, there, expected):
    write_video(tmp_path / there)
    (asked,) = read("egotempo", settings, tmp_path / "egotempo_openQA.json", egotempo(clip))
    assert (asked.record.id, asked.record.group) == (f"{clip}_0", UID)
    assert (asked.record.question_type, asked.record.answer) == ("action sequence", "They open the door.")
    assert (asked.media.names, asked.media.start, asked.media.end) == ((there,), *expected)


def test_a_clip_comes_before_the_whole_video(settings, tmp_path):
    for name in (f"{UID}.mp4", f"{UID}_1.0_3.5.mp4"):
        write_video(tmp_path / name)
    (asked,) = read("egotempo", settings, tmp_path / "egotempo_openQA.json", egotempo())
    assert (asked.media.names, asked.media.start) == ((f"{UID}_1.0_3.5.mp4",), 0.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (egotempo(), f"expected a media file, found no {{folder}}/{UID}_1.0_3.5.mp4"),
        (egotempo(UID), "expected a clip_id {video}_{start}_{end}, found"),
        (egotempo(f"{UID}_3.0_3.0"), "expected a clip_id {video}_{start}_{end}, found"),
        (egotempo(f"{UID}_nan_3.0"), "expected a clip_id {video}_{start}_{end}, found"),
        (egotempo(clip_id=None), "expected a clip_id {video}_{start}_{end}, found 'None'"),
        (egotempo(answer=["x"]), "answer: expected text"),
        ({"annotations": [3]}, "expected a JSON object, found '3'"),
    ],
)
def test_a_question_of_egotempo_is_refused(settings, tmp_path, content, message):
    said = refused("egotempo", settings, tmp_path / "egotempo_openQA.json", content)
    assert message.replace("{folder}", str(tmp_path)) in said


@pytest.mark.parametrize("content", [[], {}, {"annotations": 3}])
def test_another_file_than_egotempo_s_is_named(settings, tmp_path, content):
    with pytest.raises(UserError, match=r"expected EgoTempo's annotations, found no list under 'annotations'"):
        read("egotempo", settings, tmp_path / "other.json", content)


# The real files


@pytest.mark.parametrize("path", [real("open-eqa/open-eqa-v0.json")])
def test_all_of_openeqa_parses(settings, path, tmp_path):
    problems = Problems("skip")
    assert read("openeqa", settings, path, problems=problems, media_root=str(tmp_path)) == []
    assert problems.count == 1636
    assert all("expected a media file, found no" in said for said in problems.first)
    records = json.loads(path.read_text())
    for record in records:
        (tmp_path / record["episode_history"]).mkdir(parents=True, exist_ok=True)
        (tmp_path / record["episode_history"] / "00000-rgb.png").touch()
    found = read("openeqa", settings, path, media_root=str(tmp_path))
    assert [one.record.question for one in found] == [record["question"].strip() for record in records]
    assert sum(len(one.record.answers) > 0 for one in found) == 263
    assert (len({one.media for one in found}), len({one.record.group for one in found})) == (152, 137)
    assert len({one.record.question_type for one in found}) == 7


@pytest.mark.parametrize("path", [real("egotempo/egotempo_openQA.json")])
def test_all_of_egotempo_parses(settings, path, tmp_path):
    problems = Problems("skip")
    assert read("egotempo", settings, path, problems=problems, media_root=str(tmp_path)) == []
    assert problems.count == 500
    assert all("expected a media file, found no" in said for said in problems.first)
    annotations = json.loads(path.read_text())["annotations"]
    for video in {one["clip_id"].split("_")[0] for one in annotations}:
        (tmp_path / f"{video}.mp4").touch()
    found = read("egotempo", settings, path, media_root=str(tmp_path))
    assert [one.record.answer for one in found] == [one["answer"].strip() for one in annotations]
    assert (len({one.media for one in found}), len({one.record.group for one in found})) == (367, 222)
    assert all(0 <= one.media.start < one.media.end for one in found)


@pytest.mark.parametrize("path", [real("open-eqa/open-eqa-demo-data.json")])
def test_the_demo_of_openeqa_is_decoded(settings, path):
    found = read("openeqa", settings, path, max_frames=4)
    assert [one.record.answer for one in found][::2] == ["Eight chairs", "Bedroom"]
    (media,) = {one.media for one in found}
    assert len(media.load(settings.data.model_copy(update={"max_frames": 4})).frames) == 4


# Choices and ids


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(1, "ball"), ("1", "ball"), (" 0 ", "cup"), ("ball", "ball"), ("B. ball", "ball"), ("B", "B"), (True, True),
     (None, None), (1.0, 1.0), ("x", "x")],
)  # fmt: skip
def test_an_answer_is_an_option_by_index_or_text(answer, expected):
    assert chosen(answer, ["A. cup", "B. ball"]) is expected or chosen(answer, ["A. cup", "B. ball"]) == expected


def test_an_index_beyond_the_options_is_refused():
    for answer in (2, "2", -1):
        with pytest.raises(BadRecordError, match="an index of 2 options"):
            chosen(answer, ["cup", "ball"])


def test_numbers_as_options_are_texts_first():
    assert [chosen(answer, ["3", "2", "0"]) for answer in ("0", 0, "2")] == ["0", "3", "2"]
    assert chosen("1", ["A. 1", "B. 0"]) == "1"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["A. a cup", "B. a ball"], ["a cup", "a ball"]),
        (["(A) a cup", "(B) a ball"], ["a cup", "a ball"]),
        (["A) a cup", "B) a\nball"], ["a cup", "a\nball"]),
        (["A. a cup", "a ball"], ["A. a cup", "a ball"]),
        (["B. a cup", "A. a ball"], ["B. a cup", "A. a ball"]),
        (["A cup", "B ball"], ["A cup", "B ball"]),
        ([3, 4], [3, 4]),
        ([], []),
    ],
)
def test_letters_of_their_own_are_taken_off_options(options, expected):
    assert plain_options(options) == expected


def test_texts_are_stored_in_one_normal_form(settings, tmp_path):
    """Three of each word: composed, decomposed, and a letter with a nukta, which composing takes apart."""
    for composed, other in (
        ("café", "cafe\u0301"),
        ("한글", "\u1112\u1161\u11ab\u1100\u1173\u11af"),
        ("क़लम", "\u0958लम"),
    ):
        line = {"question": f"{other}?", "answer": other, "answers": [composed, other], "options": None}
        (asked,) = read("jsonl", settings, tmp_path / "qa.jsonl", json.dumps(line))
        assert (asked.record.question, asked.record.accepted()) == (f"{composed}?", (composed,))
        for answer, options in ((composed, [other, "x"]), (other, [composed, "x"])):
            line = {"question": "Which?", "answer": answer, "options": options}
            (asked,) = read("jsonl", settings, tmp_path / "qa.jsonl", json.dumps(line))
            assert (asked.record.options, asked.record.accepted()) == ((composed, "x"), ("A",))
            assert chosen(f"A. {answer}", [f"A. {options[0]}", "B. x"]) == composed
        line = {"question": "Which?", "answer": "A", "options": [composed, other]}
        assert "expected two or more different options" in refused("jsonl", settings, tmp_path / "qa.jsonl", line)


def test_videos_are_known_by_their_ids():
    names = [
        f"Ego4d_clip/{UID}-19.mp4",
        f"{OTHER.upper()}_120.0_180.0",
        "EpicKitchens/P01_105.MP4",
        "scannet-v0/002-scannet-scene0709_00",
        "scene-000123",
        "xP01_10x",
        "clip.mp4",
    ]
    assert video_ids(names) == {UID, OTHER, "p01_105", "scene0709"}


# The hub


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data set's folder; what `datasets` keeps of it is thrown away."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub_dataset._open.cache_clear()
    hub_dataset._commit.cache_clear()
    (tmp_path / "set").mkdir()
    yield tmp_path / "set"
    hub_dataset._open.cache_clear()
    hub_dataset._commit.cache_clear()


def hub_data(settings, folder, fields, splits=None, **data):
    splits = splits or {"train": "by group"}
    section = Hub(id=str(folder), config=None, revision=None, splits=splits, fields=fields)
    path = {"source": "hub", "path": str(folder / "x"), "hub": section}
    return settings.data.model_copy(update=path | data)


def from_hub(settings, folder, fields, splits=None, problems=None, **data):
    return list(hub_dataset.read(hub_data(settings, folder, fields, splits, **data), problems or Problems("stop")))


def write_images(folder, **splits):
    """Each split's rows: question, answer, and the seeds of pictures; one in `photo`, several in `photos`."""
    from datasets import Dataset, Features, Image, List, Value

    features = Features(
        {"q": Value("string"), "a": Value("int64"), "choices": List(Value("string")), "photo": Image(),
         "photos": List(Image())}
    )  # fmt: skip
    for split, rows in splits.items():
        table = {
            "q": [row[0] for row in rows],
            "a": [row[1] for row in rows],
            "choices": [["A. cup", "B. ball"]] * len(rows),
            "photo": [{"bytes": picture(row[2][0]), "path": None} if len(row[2]) == 1 else None for row in rows],
            "photos": [
                [{"bytes": picture(n), "path": None} for n in row[2]] if len(row[2]) > 1 else None for row in rows
            ],
        }
        Dataset.from_dict(table, features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


IMAGE_FIELDS = {"question": "q", "answer": "a", "options": "choices", "image": "photo", "images": "photos"}


def test_images_in_a_data_set_are_read(settings, folder):
    write_images(folder, train=[("One?", 1, [1]), ("Two?", 0, [2, 3])], test=[("Again?", 1, [1])])
    splits = {"test": "test", "train": "by group"}
    again, one, two = from_hub(settings, folder, IMAGE_FIELDS, splits)
    assert [asked.record.question for asked in (again, one, two)] == ["Again?", "One?", "Two?"]
    assert [asked.record.split for asked in (again, one, two)] == ["test", None, None]
    assert [asked.record.id for asked in (again, one, two)] == ["test-0", "train-0", "train-1"]
    assert [asked.record.accepted() for asked in (one, two)] == [("B",), ("A",)]
    assert one.record.options == ("cup", "ball")
    assert one.record.place == f"{folder}: train[0]"
    assert again.media.key() == one.media.key() == hashlib.sha256(picture(1)).hexdigest()
    assert (one.media.kind, two.media.kind, len(two.media.group())) == ("image", "frames", 2)
    small = pickle.dumps(two.media)
    assert len(small) < 1000
    hub_dataset._open.cache_clear()  # as in another process
    shown = [brightness(frame) for frame in pickle.loads(small).load(settings.data).frames]
    alone = [Files("image", folder, (f"{n}.jpg",)) for n in (2, 3)]
    for n in (2, 3):
        (folder / f"{n}.jpg").write_bytes(picture(n))
    assert shown == [brightness(media.load(settings.data).frames[0]) for media in alone]
    assert shown[0] != shown[1]


def test_an_image_that_cannot_be_read_is_named(settings, folder):
    pq.write_table(
        pa.table({"q": ["What?"], "photo": [{"bytes": b"\xff\xd8 no image", "path": None}]}), folder / "train.parquet"
    )
    (asked,) = from_hub(settings, folder, {"question": "q", "image": "photo"})
    with pytest.raises(BadRecordError, match=r"expected a readable image, found train\[0\]\.photo") as error:
        asked.media.load(settings.data)
    assert " at 0x" not in str(error.value)  # it is in the card, which is the same every time


def test_media_of_a_data_set_are_found_by_path(settings, folder, tmp_path):
    rows = [
        {"q": "One?", "a": "so", "frames": ["a.jpg", "a.jpg"], "clip": None, "from": None, "to": None, "n": 7},
        {"q": "Two?", "a": None, "frames": None, "clip": "clip", "from": 0.5, "to": 2.0, "n": 8},
        {"q": "Three?", "a": "so", "frames": None, "clip": None, "from": None, "to": None, "n": 9},
        {"q": "Four?", "a": "so", "frames": None, "clip": "clip.mp4", "from": None, "to": 9.5, "n": 10},
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.jpg").write_bytes(picture(1))
    write_video(tmp_path / "clip.mp4")
    fields = {
        "question": "q",
        "answer": "a",
        "images": "frames",
        "video": "clip",
        "start": "from",
        "end": "to",
        "id": "n",
    }
    one, two, three, four = from_hub(settings, folder, fields, media_root=str(tmp_path))
    assert (one.media.names, one.media.kind, one.record.id) == (("a.jpg", "a.jpg"), "frames", "7")
    assert (two.media.names, two.media.start, two.media.end) == (("clip.mp4",), 0.5, 2.0)
    assert (two.record.answer, three.media, four.media.end) == (None, None, 9.5)


class Malicious:
    """Of a pickle that is run, there is a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_pickle_in_a_parquet_file_is_not_run(settings, tmp_path, monkeypatch):
    """As a type of Arrow's that older versions unpickle when they read a schema."""
    monkeypatch.chdir(tmp_path)
    kind = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Malicious())}
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a cup"}]
    table = pa.Table.from_pylist([{"id": "1", "q": "What?", "a": "a cup", "conversations": turns}])
    schema = pa.schema([field.with_metadata(kind) for field in table.schema])
    (tmp_path / "set").mkdir()
    path = tmp_path / "set/train.parquet"
    pq.write_table(table.cast(schema), path)
    assert pq.read_metadata(path).schema.to_arrow_schema().field("q").metadata  # it has arrived in the file
    (own,) = read("llava", settings, path)
    (hubs,) = from_hub(settings, path.parent, {"question": "q", "answer": "a"}, {"train": "train"})
    assert [one.record.answer for one in (own, hubs)] == ["a cup", "a cup"]
    with pytest.raises(UserError, match="expected columns"):
        Split(path)
    assert not (tmp_path / "executed").exists()


def test_columns_of_the_hub_are_named_by_the_fields(settings, folder):
    row = {"q": "Which?", "a": "1", "also": [0], "o": ["red", "blue"], "t": 3, "g": "home", "s": "validation"}
    pq.write_table(pa.Table.from_pylist([row]), folder / "train.parquet")
    fields = {"question": "q", "answer": "a", "answers": "also", "options": "o", "question_type": "t", "group": "g"}
    (asked,) = from_hub(settings, folder, fields | {"split": "s"}, {"train": "train"})
    found = asked.record
    assert (found.accepted(), found.question_type, found.group, found.split) == (("B", "A"), "3", "home", "validation")


def test_numbers_of_the_hub_are_answers(settings, folder):
    pq.write_table(pa.table({"q": ["How many?"], "n": [3], "more": [[4, 5]]}), folder / "train.parquet")
    (asked,) = from_hub(settings, folder, {"question": "q", "answer": "n", "answers": "more"})
    assert asked.record.accepted() == ("3", "4", "5")


def write_classes(folder, rows, **features):
    from datasets import Dataset, Features, Value

    table = {name: [row.get(name) for row in rows] for name in ("q", *features)}
    Dataset.from_dict(table, Features({"q": Value("string")} | features)).to_parquet(folder / "train.parquet")


def test_classes_of_the_hub_are_their_names(settings, folder):
    from datasets import ClassLabel, List

    fruit, kind = ClassLabel(names=["an apple", "a pear", "a fig"]), ClassLabel(names=["name", "count"])
    rows = [
        {"q": "One?", "a": 2, "more": [2, 0], "kind": 1},
        {"q": "Two?", "a": 1, "more": [], "choices": [2, 1], "kind": 0},
        {"q": "Three?", "a": -1, "more": None, "kind": 0},
        {"q": "Four?", "a": None, "kind": 0},
    ]
    write_classes(folder, rows, a=fruit, more=List(fruit), choices=List(fruit), kind=kind)
    fields = {"question": "q", "answer": "a", "answers": "more", "options": "choices", "question_type": "kind"}
    found = [one.record for one in from_hub(settings, folder, fields)]
    assert [one.accepted() for one in found] == [("a fig", "an apple"), ("B",), (), ()]
    assert found[1].options == ("a fig", "a pear")
    assert [one.question_type for one in found] == ["count", "name", "name", "name"]


@pytest.mark.parametrize(
    ("names", "expected"), [(["A", "B", "C"], "C"), (["a", "b", "c"], "C"), (None, "C"), (["y", "B", "x"], "B")]
)
def test_classes_that_count_options_are_indices(settings, folder, names, expected):
    """Also where a number or letter is the text of another option."""
    from datasets import ClassLabel, List, Value

    label = ClassLabel(names=names) if names else ClassLabel(num_classes=3)
    write_classes(folder, [{"q": "Which?", "a": 2, "o": ["2", "x", "B"]}], a=label, o=List(Value("string")))
    (asked,) = from_hub(settings, folder, {"question": "q", "answer": "a", "options": "o"})
    assert asked.record.accepted() == (expected,)
    (asked,) = from_hub(settings, folder, {"question": "q", "answer": "a"})
    assert asked.record.accepted() == ((names or "012")[2],)


def test_a_class_that_is_not_there_is_refused(settings, folder):
    from datasets import Value

    write_classes(folder, [{"q": "What?", "a": 7}], a=Value("int64"))
    table = pq.read_table(folder / "train.parquet")
    features = {"q": {"dtype": "string", "_type": "Value"}, "a": {"names": ["x", "y"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), folder / "train.parquet")
    with pytest.raises(UserError, match=r"train\[0\]: answer: expected a class from 0 to 1, found 7; correct it"):
        from_hub(settings, folder, {"question": "q", "answer": "a"})


def test_folders_of_images_are_classes(settings, folder):
    for name in ("cups", "balls"):
        (folder / "train" / name).mkdir(parents=True)
        (folder / "train" / name / "1.png").write_bytes(picture(1))
    (folder / "train" / "balls" / "2.png").write_bytes(picture(2))
    fields = {"question": "label", "answer": "label", "image": "image"}
    assert [one.record.answer for one in from_hub(settings, folder, fields)] == ["balls", "balls", "cups"]


def test_places_of_images_before_a_question_of_the_hub_are_taken_off(settings, folder):
    rows = [
        {"q": "<image>\nWhat?", "f": ["a.jpg"]},
        {"q": " <image> <image>\n<speech>What\nnow?", "f": ["a.jpg", "a.jpg"]},
        {"q": "<video>\nAnd then?", "f": ["a.jpg", "a.jpg"]},
        {"q": "Where?", "f": ["a.jpg"]},
    ]
    (folder / "a.jpg").write_bytes(picture(1))
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = from_hub(settings, folder, {"question": "q", "images": "f"}, media_root=str(folder))
    assert [one.record.question for one in found] == ["What?", "What\nnow?", "And then?", "Where?"]


def test_an_image_in_train_and_test_stays_in_the_test(settings, folder):
    """Though its first question is of the training split, which groups decide on."""
    write_images(folder, train=[("One?", 1, [1]), ("Two?", 0, [2])], test=[("Again?", 1, [1])])
    splits = {"train": "by group", "test": "test"}
    data = hub_data(settings, folder, IMAGE_FIELDS, splits, validation_fraction=0.0, test_fraction=0.0)
    found = assemble([("set", hub_dataset.read(data, Problems("stop")))], data, Problems("stop"), Counter())
    assert {unit.split: [one.id for one in unit.questions] for unit in found} == {
        "test": ["train-0", "test-0"],
        "train": ["train-1"],
    }


def test_a_folder_of_images_is_a_data_set(settings, folder):
    (folder / "train").mkdir()
    (folder / "train" / "a.png").write_bytes(picture(1))
    (folder / "train" / "metadata.csv").write_text("file_name,text,count\na.png,How many?,3\n")
    (asked,) = from_hub(settings, folder, {"question": "text", "answer": "count", "image": "image"})
    assert asked.record.answer == "3"
    assert len(asked.media.load(settings.data).frames) == 1


@pytest.mark.parametrize(
    ("values", "fields", "message"),
    [
        ({"a": 7}, {"answer": "a", "options": "o"}, "an index of 2 options, from 0, found 7"),
        ({"a": "green"}, {"answer": "a", "options": "o"}, "a letter of 'AB' or an option's text, found 'green'"),
        ({"o": "x, y"}, {"options": "o"}, "options: expected a list, found 'x, y'"),
        ({"s": "dev"}, {"split": "s"}, "split: expected one of 'train', 'validation' or 'test', found 'dev'"),
        ({"f": "gone.jpg"}, {"image": "f"}, "expected a media file, found no"),
        ({"f": "../../../etc/passwd"}, {"image": "f"}, "expected media below"),
        ({"f": {"bytes": None, "path": "/etc/passwd"}}, {"image": "f"}, "expected media below"),
        ({"f": {"url": "x"}}, {"image": "f"}, "image: expected an image or a path"),
        ({"f": "a.jpg", "v": "b.mp4"}, {"image": "f", "video": "v"}, "found image and video; leave one out"),
        ({"t": float("nan")}, {"start": "t"}, "start: expected seconds, found nan"),
        ({"t": 1.0}, {"start": "t"}, "expected start and end with a video alone, found them with no media"),
        ({"t": 1.0, "f": "a.jpg"}, {"end": "t", "image": "f"}, "with a video alone, found them with image; leave them"),
        ({"q": "What is <image>?"}, {}, "expected plain text, found the special token '<image>'"),
        # A column that is not mapped, a value that is absent, and another number.
        ({"q": "<image>\nWhat?", "f": "a.jpg"}, {}, "found 1 of these and 0 media; map the column of the media"),
        ({"q": "<video>What?", "v": None}, {"video": "v"}, "found 1 of these and 0 media; map the column"),
        ({"q": "<image><image>What?", "f": "a.jpg"}, {"image": "f"}, "found 2 of these and 1 media; map the column"),
        ({"q": "<image>What?", "f": ["a.jpg", "b.jpg"]}, {"images": "f"}, "found 1 of these and 2 media; map the"),
    ],
)  # fmt: skip
def test_a_row_of_the_hub_is_refused(settings, folder, values, fields, message):
    row = {"q": "What?", "o": ["red", "blue"]} | values
    pq.write_table(pa.Table.from_pylist([row]), folder / "train.parquet")
    problems = Problems("skip")
    assert from_hub(settings, folder, {"question": "q"} | fields, problems=problems) == []
    assert problems.first[0].startswith(f"{folder}: train[0]: ")
    assert message in problems.first[0]


@pytest.mark.parametrize(
    ("fields", "splits", "message"),
    [
        ({"question": "q", "picture": "f"}, None, "data.hub.fields: expected names of"),
        ({"answer": "q"}, None, "data.hub: expected a column for 'question'"),
        ({"question": "q"}, {}, "data.hub: expected a column for 'question' or 'text' under fields and a split"),
        ({"question": "text"}, None, "expected the column 'text', found ['q']; correct data.hub"),
        ({"question": "q"}, {"dev": "test"}, 'found Unknown split "dev"'),
    ],
)
def test_a_wrong_section_is_named(settings, folder, fields, splits, message):
    pq.write_table(pa.table({"q": ["What?"]}), folder / "train.parquet")
    data = hub_data(settings, folder, fields)
    if splits is not None:
        data = data.model_copy(update={"hub": data.hub.model_copy(update={"splits": splits})})
    with pytest.raises(UserError) as error:
        list(hub_dataset.read(data, Problems("skip")))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_data_set_s_own_code_is_not_run(settings, folder):
    (folder / f"{folder.name}.py").write_text("raise SystemExit('run')")
    with pytest.raises(UserError, match="expected a data set, found"):
        from_hub(settings, folder, {"question": "q"})


def test_a_data_set_of_the_hub_is_loaded_at_one_commit(settings, folder, monkeypatch):
    import datasets
    from huggingface_hub import HfApi

    asked = []

    def resolve(self, repository, *, repo_type, revision):
        asked.append((repository, repo_type, revision))
        return type("Resolved", (), {"resolved": "c0ffee"})()

    load = datasets.load_dataset
    pq.write_table(pa.table({"q": ["What?"]}), folder / "train.parquet")
    monkeypatch.setattr(HfApi, "resolve_revision", resolve)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *names, **options: asked.append((*names, options)) or load(str(folder), split=options["split"]),
    )
    section = Hub(id="me/set", config="EgoIT", revision="v1", splits={"train": "train"}, fields={"question": "q"})
    data = settings.data.model_copy(update={"source": "hub", "hub": section})
    assert len(list(hub_dataset.read(data, Problems("stop")))) == 1
    assert hub_dataset.commit(section) == "c0ffee"
    assert asked == [("me/set", "dataset", "v1"), ("me/set", "EgoIT", {"split": "train", "revision": "c0ffee"})]
