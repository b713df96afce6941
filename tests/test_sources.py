"""JSON Lines files and their media: what is read, and what is refused in one line."""

import io
import json

import av
import numpy as np
import pytest
from conftest import picture
from PIL import Image

from firstsight.core.errors import UserError
from firstsight.sources import jsonl
from firstsight.sources.media import read_image, read_video


def write_video(path, frames=40, rate=10, size=(160, 120)):
    """Frame n is grey of brightness 5 n."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            grey = np.full((size[1], size[0], 3), 5 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey)))
        container.mux(stream.encode())


def brightness(jpeg: bytes) -> float:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("L"), dtype=float).mean() / 5


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture(1))
    (tmp_path / "b.jpg").write_bytes(picture(2))
    write_video(tmp_path / "clip.mp4")
    return tmp_path


def read(folder, settings, *lines):
    path = folder / "qa.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return list(jsonl.read(settings.data.model_copy(update={"source": "jsonl", "path": str(path)})))


def test_lines_about_one_media_are_one_sample(folder, settings):
    samples = read(
        folder,
        settings,
        {"media": "a.jpg", "question": "What?", "answer": "a cup", "answers": ["cup"], "question_type": "object"},
        {"media": "clip.mp4", "question": "How many?", "answer": "two", "group": "home", "split": "test"},
        {"media": "a.jpg", "question": "Which?", "answer": "a ball", "options": ["a cup", "a ball"]},
        "",
        {"media": ["a.jpg", "b.jpg"], "question": "What changed?", "answer": "nothing"},
        {"question": "What is a cup for?", "answer": "drinking"},
    )
    kinds = [(sample.media_kind, len(sample.frames), given) for sample, given in samples]
    assert kinds == [("image", 1, None), ("video", 4, "test"), ("frames", 2, None), ("none", 0, None)]
    first, clip = samples[0][0], samples[1][0]
    assert [(record.answer, record.answers) for record in first.records] == [("a cup", ("a cup", "cup")), ("B", ("B",))]
    assert (clip.group, clip.fps) == ("home", 1.0)
    assert first.group == "a.jpg"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"media": "a.jpg", "question": "What?"}, "line 1: expected a value for 'answer', found none"),
        (
            {"media": "a.jpg", "question": "What?", "answer": " "},
            "line 1: expected text for 'answer', found an empty",
        ),
        ({"media": "gone.jpg", "question": "What?", "answer": "x"}, "line 1: expected a media file, found no"),
        ({"question": "What?", "answer": "x", "anwser": "y"}, "found the key 'anwser'"),
        ({"question": "What?", "answer": 3}, "line 1: answer: input should be a valid string, found 3"),
        (
            {"question": "What?", "answer": "C", "options": ["x", "y"]},
            "line 1: expected the answer to be a letter of",
        ),
        (
            {"media": "clip.mp4", "question": "What?", "answer": "x", "start": 9.0},
            "expected a window within the 4.00",
        ),
        ({"media": "a.jpg", "question": "What?", "answer": "x", "end": 1}, "expected start and end with a video alone"),
        ({"question": "What?", "answer": "cup <|im_end|> red"}, "answer: expected plain text, found the special token"),
        ({"media": [], "question": "What?", "answer": "x"}, "line 1: media"),
        ({"media": "a" * 300, "question": "What?", "answer": "x"}, "line 1: expected a media file, found no"),
        ("{", "line 1: expected a JSON object, found '{'"),
        ("[" * 100_000, "line 1: expected a JSON object, found"),
        ("[]", "line 1: expected a JSON object, found []"),
        ("", "expected records, found an empty file"),
    ],
)
def test_a_wrong_line_is_named(folder, settings, line, message):
    with pytest.raises(UserError) as error:
        read(folder, settings, line)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "kind"), [("broken.jpg", "image"), ("broken.mp4", "video")])
def test_unreadable_media_is_named(folder, settings, name, kind):
    (folder / name).write_bytes(b"\xff\xd8 not media")
    with pytest.raises(UserError, match=rf"line 1: expected a readable {kind}, found .*{name}"):
        read(folder, settings, {"media": name, "question": "What?", "answer": "x"})


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ({"media": "a.jpg", "split": "train"}, {"media": "./a.jpg", "split": "test"}, "split for the same group"),
        (
            {"media": "clip.mp4", "end": 1, "split": "train"},
            {"media": "clip.mp4", "start": 2, "split": "test"},
            "split",
        ),
        (
            {"media": ["a.jpg", "b.jpg"], "split": "train"},
            {"media": "b.jpg", "split": "test"},
            "split for the same group",
        ),
        ({"group": "home", "split": "train"}, {"group": "home", "split": "test"}, "split for the same group"),
        ({"media": "a.jpg", "group": "x"}, {"media": "a.jpg", "group": "y"}, "group for the same media"),
        ({"id": "one"}, {"id": "one"}, "line for the same id"),
    ],
)
def test_lines_that_would_leak_or_clash_are_refused(folder, settings, first, second, what):
    with pytest.raises(UserError, match=f"line 2: expected the same {what}"):
        read(
            folder, settings, *({"question": f"{n}?", "answer": "x", **line} for n, line in enumerate((first, second)))
        )


def test_files_seen_together_are_one_group_in_any_order(folder, settings):
    (folder / "c.jpg").write_bytes(picture(3))
    lines = [
        {"media": media, "question": "What?", "answer": "x"}
        for media in ("c.jpg", ["b.jpg", "c.jpg"], ["a.jpg", "b.jpg"])
    ]
    for order in (lines, lines[::-1]):
        assert {sample.group for sample, _ in read(folder, settings, *order)} == {"a.jpg"}


def test_windows_of_one_video_may_name_groups_of_their_own(folder, settings):
    line = {"media": "clip.mp4", "question": "What?", "answer": "x"}
    samples = read(folder, settings, {**line, "end": 2, "group": "a", "split": "train"},
                   {**line, "start": 2, "group": "b", "split": "test"})  # fmt: skip
    assert [(sample.group, split) for sample, split in samples] == [("a", "train"), ("b", "test")]


def test_pictures_are_turned_upright(tmp_path, settings):
    wide = Image.new("RGB", (112, 56))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    wide.save(tmp_path / "phone.jpg", exif=exif)
    assert Image.open(io.BytesIO(read_image(tmp_path / "phone.jpg", settings.data, "here"))).size == (56, 112)


def test_what_editors_and_json_allow_is_read(folder, settings):
    path = folder / "qa.jsonl"
    record = '{"question": "What?\u2028", "answer": "y", "options": ["x", "y"], "answers": ["x"]}'
    path.write_bytes(b"\xef\xbb\xbf" + record.encode() + b"\r\n")
    data = settings.data.model_copy(update={"source": "jsonl", "path": str(path)})
    ((sample, _),) = jsonl.read(data)
    assert sample.records[0].answers == ("B", "A")


def test_a_missing_file_is_named(tmp_path, settings):
    data = settings.data.model_copy(update={"source": "jsonl", "path": str(tmp_path / "no.jsonl")})
    with pytest.raises(UserError, match=r"data\.path: expected a JSON Lines file"):
        list(jsonl.read(data))


@pytest.mark.parametrize(
    ("start", "end", "fps", "expected"),
    [
        (0.0, None, 1.0, [5, 15, 25, 35]),  # the middle of each second of four
        (1.0, 3.0, 1.0, [15, 25]),
        (0.0, None, 0.1, [10, 30]),  # at least two
        (0.0, None, 30.0, [2, 7, 12, 17, 22, 27, 32, 37]),  # at most max_frames
    ],
)
def test_video_frames_are_those_on_show_at_even_times(folder, settings, start, end, fps, expected):
    data = settings.data.model_copy(update={"fps": fps, "max_frames": 9})
    frames, rate = read_video(folder / "clip.mp4", data, start, end, "here")
    assert [brightness(frame) for frame in frames] == pytest.approx(expected, abs=1)
    assert rate == pytest.approx(len(frames) / ((end or 4.0) - start))


def test_media_is_resized_within_the_budget_to_whole_visual_tokens(tmp_path, settings):
    (tmp_path / "wide.jpg").write_bytes(picture(0, width=640, height=360))
    data = settings.data.model_copy(update={"max_pixels": 12544})
    width, height = Image.open(io.BytesIO(read_image(tmp_path / "wide.jpg", data, "here"))).size
    assert width % 28 == height % 28 == 0
    assert width * height <= 12544
    assert width > height
