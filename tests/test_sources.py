"""JSON Lines and CSV files and their media: what is read, and what is refused in one line."""

import io
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext
from av.stream import Disposition
from conftest import picture
from PIL import Image

from firstsight.assembly.sources import READERS
from firstsight.core.errors import UserError
from firstsight.readers.image_decoding import read_image
from firstsight.readers.media import Files, files, first_there
from firstsight.readers.problems import BadRecordError, Problems
from firstsight.readers.video_decoding import frame_rate, read_video


def write_video(
    path, frames=40, rate=10, size=(160, 120), start=0, sound=0, codec="mpeg4", options=None, form=None, step=5
):
    """Frame n is grey of brightness `step` n.

    Args:
        start: seconds at which the first frame is shown.
        sound: seconds of it, from 0.
        options: those of the encoder.
        form: the container, by default that of the suffix.
    """
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        silence = container.add_stream("aac", rate=16000) if sound else None
        for number in range(frames):
            grey = np.full((size[1], size[0], 3), step * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey)
            frame.pts, frame.time_base = number + start * rate, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for number in range(int(sound * 16000 / 1024)):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, 1024 * number, Fraction(1, 16000)
            container.mux(silence.encode(frame))
        if silence:
            container.mux(silence.encode())


def brightness(jpeg: bytes) -> float:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("L"), dtype=float).mean() / 5


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture(1))
    (tmp_path / "b.jpg").write_bytes(picture(2))
    write_video(tmp_path / "clip.mp4")
    return tmp_path


def read(folder, settings, *lines, source="jsonl", problems=None):
    path = folder / f"qa.{source}"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    data = settings.data.model_copy(update={"source": source, "path": str(path), "fps": 1.0})
    return list(READERS[source](data, problems or Problems("stop")))


def test_a_line_is_a_question_about_media(folder, settings):
    lines = (
        {"media": "a.jpg", "question": "What?", "answer": "a cup", "answers": ["cup"], "question_type": "object"},
        {"media": "clip.mp4", "question": "How many?", "answer": "two", "group": "home", "split": "test", "end": 3},
        {"media": "./a.jpg", "question": "Which?", "answer": "a ball", "options": ["a cup", "a ball"], "id": "q"},
        "",
        {"media": ["a.jpg", "b.jpg"], "question": "What changed?"},
        {"question": "What is a cup for?", "answer": "drinking"},
    )
    first, clip, choice, frames, alone = read(folder, settings, *lines)
    assert (first.record.id, first.record.place) == ("qa-1", f"{folder / 'qa.jsonl'}: line 1")
    assert (first.record.accepted(), first.record.question_type) == (("a cup", "cup"), "object")
    assert (clip.record.group, clip.record.split, clip.media.start, clip.media.end) == ("home", "test", 0.0, 3)
    assert (choice.record.id, choice.record.accepted()) == ("q", ("B",))
    assert choice.media == first.media
    assert (frames.record.id, frames.record.answer, frames.media.names) == ("qa-5", None, ("a.jpg", "b.jpg"))
    assert [one.media and one.media.kind for one in (first, clip, frames, alone)] == ["image", "video", "frames", None]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"media": "a.jpg", "answer": "x"}, "line 1: question: expected a value, found none"),
        (
            {"media": "a.jpg", "question": "What?", "answer": " "},
            "line 1: answer: expected text that is not empty, found ' '",
        ),
        ({"media": "gone.jpg", "question": "What?", "answer": "x"}, "line 1: expected a media file, found no"),
        ({"question": "What?", "answer": "x", "anwser": "y"}, "found the key 'anwser'"),
        ({"question": "What?", "answer": 3}, "line 1: answer: expected text, found 3"),
        ({"question": "What?", "answer": "C", "options": ["x", "y"]}, "line 1: expected the answer to be a letter of"),
        ({"media": "a.jpg", "question": "What?", "end": 1}, "expected start and end with a video alone"),
        ({"media": "clip.mp4", "question": "What?", "start": 2, "end": 2}, "within the video, found 2 to 2 s"),
        ({"media": "clip.mp4", "question": "What?", "end": 0}, "within the video, found 0 to 0 s"),
        ('{"media": "clip.mp4", "question": "What?", "end": 1e999}', "end: expected seconds, found inf"),
        ({"media": "clip.mp4", "question": "What?", "start": True}, "start: expected seconds, found True"),
        ({"question": "What?", "start": 1}, "found them without media"),
        ({"question": "What?", "answer": "cup <|im_end|> red"}, "answer: expected plain text, found the special token"),
        ({"media": [], "question": "What?", "answer": "x"}, "line 1: expected media, found an empty list"),
        ({"media": ["a.jpg", 3], "question": "What?"}, "line 1: media: expected a path or a list of paths"),
        ({"media": "a" * 300, "question": "What?", "answer": "x"}, "line 1: expected a media file, found"),
        ("{", "line 1: expected a JSON object, found '{'"),
        ("[" * 100_000, "line 1: expected a JSON object, found"),
        ("[]", "line 1: expected a JSON object, found '[]'"),
        ("", "expected a JSON Lines file, found an empty file"),
    ],
)
def test_a_wrong_line_is_named_or_counted(folder, settings, line, message):
    with pytest.raises(UserError) as error:
        read(folder, settings, line)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    if line:
        problems = Problems("skip")
        assert len(read(folder, settings, line, {"question": "What?"}, problems=problems)) == 1
        assert problems.count == 1
        assert message in problems.first[0]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("a.jpg,What?,a cup,cup|a mug,,,", ("image", None, ("a cup", "cup", "a mug"), ())),
        ("clip.mp4,What?,b,,a cup | a ball,1.5,3", ("video", (1.5, 3.0), ("B",), ("a cup", "a ball"))),
        ("a.jpg | b.jpg,What?,x,,,,", ("frames", None, ("x",), ())),
        ('a.jpg,"What, ""now""?\nOr then?",x,,,,', ("image", None, ("x",), ())),
        (",What?,nan,,,,", (None, None, ("nan",), ())),
        (",What?,,,,,", (None, None, (), ())),
    ],
)
def test_a_row_is_what_the_line_is(folder, settings, row, expected):
    row = row.replace(",b,", ",a ball,")
    (asked,) = read(folder, settings, "media,question,answer,answers,options,start,end", row, source="csv")
    media, question = asked.media, asked.record
    window = (media.start, media.end) if media and media.kind == "video" else None
    assert (media and media.kind, window, question.accepted(), question.options) == expected
    assert question.question == ('What, "now"?\nOr then?' if "now" in row else "What?")
    assert question.id == "qa-2"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["question,anwser"], "line 1: expected columns of ['answer', "),
        (["question;answer"], "found 'question;answer'"),
        (["question,question"], "line 1: expected each column once, found 'question' again"),
        (["answer,media"], "line 1: expected a column 'question'"),
        (["question,answer", "What?,so,not"], "line 2: expected 2 cells, found 3; quote"),
        (["question,answer", "What?"], "line 2: expected 2 cells, found 1"),
        (["question,answer", "", '"What?" she said,so'], "line 3: expected a row of CSV, found ',' expected after"),
        (["question,answer", "What?,so", '"What?,so', "Who?,me"], "line 3: expected a row of CSV, found unexpected"),
        (
            ["question,answer", '"What?,so', "Who?,me", '"Where?",here'],
            "line 2: expected a row of CSV, found ',' expected",
        ),
        (["question,", "What?,so"], "line 2: expected a name in line 1 for the column of 'so', found none"),
        (["question,start", "What?,nan"], "line 2: start: expected seconds, found nan"),
        (["question,end", "What?,soon"], "line 2: end: expected seconds, found 'soon'"),
        (["question,options", "What?,a|"], "line 2: options.1: expected text"),
        ([""], "expected a CSV file, found an empty file"),
    ],
)
def test_a_wrong_row_is_named(folder, settings, lines, message):
    with pytest.raises(UserError) as error:
        read(folder, settings, *lines, source="csv")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_quote_that_swallows_rows_is_never_skipped(folder, settings):
    rows = ("What?,so", '"Who?,me', "Where?,here", "When?,now")
    with pytest.raises(UserError, match=r"line 3: .* unexpected end of data, reading up to line 5; close the quote"):
        read(folder, settings, "question,answer", *rows, source="csv", problems=Problems("skip"))


def test_what_spreadsheets_leave_behind_is_no_record(folder, settings):
    (asked,) = read(folder, settings, "question,answer,,", "What?,so,,", ",,,", " ,,,", source="csv")
    assert (asked.record.question, asked.record.answer) == ("What?", "so")


def test_rows_after_a_wrong_one_are_read(folder, settings):
    problems = Problems("skip")
    rows = ("What?,so", 'Wh"at?,so', '"What?" no,so', "Who?,me,you", '"Where', 'now?",here')
    found = read(folder, settings, "question,answer", *rows, source="csv", problems=problems)
    assert [one.record.question for one in found] == ["What?", 'Wh"at?', "Where\nnow?"]
    assert [one.record.id for one in found] == ["qa-2", "qa-3", "qa-6"]
    assert [problem.split(": ")[1] for problem in problems.first] == ["line 4", "line 5"]


@pytest.mark.parametrize(("name", "kind"), [("broken.jpg", "image"), ("broken.mp4", "video")])
def test_unreadable_media_is_named(folder, settings, name, kind):
    (folder / name).write_bytes(b"\xff\xd8 not media")
    media = files(folder, name)
    with pytest.raises(BadRecordError, match=rf"expected a readable {kind}, found .*{name}"):
        media.load(settings.data)
    if kind == "video":
        (folder / name).write_bytes(b"")
        with pytest.raises(BadRecordError, match=rf"expected a readable video, found .*{name}"):
            frame_rate(folder / name)


NAMES = [
    "12:30:05.mp4", "C:\\a.mp4", "http:a.mp4", "concat:a.mp4|b.mp4", "pipe:0.mp4", "file:a.mp4", "data:,a.mp4",
    "subfile,,start,0,end,10,,:a.mp4", "rtsp:a.mp4", "crypto:a.mp4", "-i.mp4", "50%.mp4", "a%03d.mp4", "a#t=1.mp4",
    "a?b=c&d.mp4", " a b .mp4", "*.mp4", "[0-9].mp4", "~.mp4", "$HOME.mp4", "a\nb.mp4", "'\".mp4", "數據 手.mp4",
    "e\u0301.mp4", "🖐.MP4", "http:/a.mp4", "a:b/c:d.mp4",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["video", "image"])
def test_any_name_of_a_file_is_read(tmp_path, settings, monkeypatch, name, kind):
    """Also in the folder where the command is run, where a path does not begin with a folder."""
    monkeypatch.chdir(tmp_path)
    name = name if kind == "video" else f"{name}.jpg"
    Path(name).parent.mkdir(exist_ok=True, parents=True)
    if kind == "video":
        write_video("clip.mp4", 4)
        Path("clip.mp4").rename(name)
        assert frame_rate(Path(name)) == 10
    else:
        Path(name).write_bytes(picture(1))
    media = files(Path(), name)
    assert (media.kind, len(media.load(settings.data).frames)) == (kind, 2 if kind == "video" else 1)


def test_a_window_beyond_the_video_is_named(folder, settings):
    with pytest.raises(BadRecordError, match=r"expected a window within the 4\.00 s"):
        files(folder, "clip.mp4", 9.0).load(settings.data)


def test_one_file_is_one_media_whatever_it_is_called(folder):
    (folder / "link").symlink_to(folder)
    (folder / "other.mp4").symlink_to("clip.mp4")
    names = ["clip.mp4", "./clip.mp4", "link/clip.mp4", "other.mp4", str(folder / "clip.mp4")]
    # The parent of where a link leads to, not of the link.
    (folder / "deep/er").mkdir(parents=True)
    (folder / "deep/clip.mp4").write_bytes(b"another")
    (folder / "far").symlink_to(folder / "deep/er")
    found = [files(folder, name) for name in [*names, "far/../clip.mp4"]]
    assert [media.names for media in found] == [("clip.mp4",)] * 5 + [("deep/clip.mp4",)]
    assert len({media.key() for media in found}) == 2


def test_a_way_out_through_a_link_is_not_taken(tmp_path, settings):
    """What is checked is what is read: `..` leads out of the folder that a link leads to."""
    root = tmp_path / "root"
    (root / "deep/er/est").mkdir(parents=True)
    (root / "link").symlink_to(root / "deep/er/est")
    (root / "deep/secret.png").write_bytes(picture(1))
    (tmp_path / "secret.png").write_bytes(picture(2))
    media = files(root, "link/../../secret.png")
    assert media.names == ("deep/secret.png",)
    (root / "deep/secret.png").unlink()
    with pytest.raises(BadRecordError, match="expected a media file, found no"):
        files(root, "link/../../secret.png")


def test_a_window_in_whole_seconds_is_the_one_in_fractions(folder):
    assert files(folder, "clip.mp4", 1, 3).key() == files(folder, "clip.mp4", 1.0, 3.0).key()


def test_what_differs_has_another_key(tmp_path):
    shown = [
        Files("video", tmp_path, ("a.mp4",), 1234567.1, None),
        Files("video", tmp_path, ("a.mp4",), 1234567.2, None),
        Files("video", tmp_path, ("a.mp4",), 0.0, 1234567.2),
        Files("frames", tmp_path, ("a.jpg", "b.jpg")),
        Files("frames", tmp_path, ("a.jpg|b.jpg",)),
        Files("image", tmp_path, ("a.mp4#0-",)),
        Files("video", tmp_path, ("a.mp4",)),
    ]
    assert len({media.key() for media in shown}) == len(shown)


@pytest.mark.parametrize("suffix", [".mp4", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".3gp", ".wmv", ".flv"])
def test_a_video_is_told_by_its_suffix(tmp_path, settings, suffix):
    """By content: what a suffix is usually the form of is not asked."""
    write_video(tmp_path / "clip.mp4")
    (tmp_path / "clip.mp4").rename(tmp_path / f"clip{suffix.upper()}")
    media = files(tmp_path, f"clip{suffix.upper()}", 1.0, 3.0)
    assert [brightness(frame) for frame in media.load(settings.data).frames] == pytest.approx([15, 25], abs=1)


def test_the_first_file_that_is_there_is_taken(folder):
    assert frame_rate(folder / "clip.mp4") == 10
    assert first_there(folder, ["no.mp4", "b.jpg", "a.jpg"]) == "b.jpg"
    assert first_there(folder, ["x" * 5000, "no\0.mp4"]) == "x" * 5000


def test_pictures_are_turned_upright(tmp_path, settings):
    wide = Image.new("RGB", (112, 56))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    wide.save(tmp_path / "phone.jpg", exif=exif)
    assert Image.open(io.BytesIO(read_image(tmp_path / "phone.jpg", settings.data))).size == (56, 112)


def test_what_editors_and_json_allow_is_read(folder, settings):
    record = '{"question": "What?\u2028", "answer": "y", "options": ["x", "y"], "answers": ["x"]}'
    (asked,) = read(folder, settings, "\ufeff" + record + "\r", "")
    assert asked.record.accepted() == ("B", "A")
    (asked,) = read(folder, settings, "\ufeffquestion,answer\r", "What?,so\r", "", source="csv")
    assert (asked.record.question, asked.record.answer) == ("What?", "so")


@pytest.mark.parametrize("source", [source for source in READERS if source not in ("synthetic", "hub")])
def test_a_missing_file_is_named(tmp_path, settings, source):
    data = settings.data.model_copy(update={"source": source, "path": str(tmp_path / "no.file")})
    with pytest.raises(UserError, match=r"data\.path: expected .* in UTF-8, found .*no\.file"):
        list(READERS[source](data, Problems("skip")))


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
    frames, rate = read_video(folder / "clip.mp4", data, start, end)
    assert [brightness(frame) for frame in frames] == pytest.approx(expected, abs=1)
    assert rate == pytest.approx(len(frames) / ((end or 4.0) - start))


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "wmv", "ts"])
def test_a_video_ends_with_its_pictures_and_begins_with_them(tmp_path, settings, suffix):
    """Whatever the sound does, and whatever the file says of its length."""
    path = tmp_path / f"late.{suffix}"
    write_video(path, start=5, sound=12)
    data = settings.data.model_copy(update={"fps": 1.0})
    frames, rate = read_video(path, data, 0.0, None)
    assert [brightness(frame) for frame in frames] == pytest.approx([5, 15, 25, 35], abs=1)
    assert rate == pytest.approx(1, abs=0.05)
    with pytest.raises(BadRecordError, match=r"expected a window within the (4\.0|3\.9).* s of"):
        read_video(path, data, 4.2, None)


# Each a film of 100 frames, 5 a second: name, codec, options of the encoder.
FILMS = {
    "mp4": ("clip.mp4", "libx264", {"bf": "2"}),
    "mov": ("clip.mov", "mpeg4", {"bf": "2"}),
    "mkv": ("clip.mkv", "libx264", {"bf": "2"}),
    "intra refresh": ("clip.mkv", "libx264", {"x264-params": "intra-refresh=1:keyint=25"}),
    "webm": ("clip.webm", "libvpx", {"deadline": "realtime"}),
    "ts": ("clip.ts", "libx264", {"bf": "0"}),
    "ts of B-frames": ("clip.ts", "libx264", {"bf": "3"}),
    "ts of open groups": ("clip.ts", "libx264", {"x264-params": "open-gop=1:bframes=3:keyint=25"}),
    "ts of one group": ("clip.ts", "libx264", {"bf": "3", "g": "250"}),
    "ts of MPEG-4": ("clip.ts", "mpeg4", {"bf": "2"}),
    "mts with sound": ("clip.mts", "libx264", {"bf": "3"}),
    "m2ts with sound": ("clip.m2ts", "libx264", {"bf": "0"}),
    "avi": ("clip.avi", "mpeg4", {}),
    "avi of B-frames": ("clip.avi", "libx264", {"bf": "3"}),
    "wmv": ("clip.wmv", "wmv2", {}),
    "wmv of B-frames": ("clip.wmv", "libx264", {"bf": "3"}),
    "flv": ("clip.flv", "libx264", {"bf": "3"}),
    "no container": ("clip.mp4", "libx264", {"bf": "3"}),
}


@pytest.mark.parametrize("case", FILMS)
def test_windows_are_exact_in_every_container(tmp_path, settings, case):
    """Though few containers store when each frame is shown, and some have no index to search in."""
    name, codec, options = FILMS[case]
    options = {"g": "25", "b": "4M", "qmin": "1", "qmax": "1"} | options
    path, form, sound = tmp_path / name, "h264" if case == "no container" else None, 20 if "sound" in case else 0
    write_video(path, 100, 5, (64, 48), sound=sound, codec=codec, options=options, form=form, step=2)
    data = settings.data.model_copy(update={"fps": 2.0, "max_frames": 8})
    for start, end in [(0.0, None), (3.51, 5.53), (9.31, None), (12.71, 18.11), (18.91, 19.7), (19.83, 20.0)]:
        frames, rate = read_video(path, data, start, end)
        length = (end or 20.0) - start
        assert len(frames) / rate == pytest.approx(length, abs=0.01)
        times = start + (np.arange(len(frames)) + 0.5) * length / len(frames)
        assert [5 * brightness(frame) for frame in frames] == pytest.approx(2 * np.floor(5 * times), abs=1.5)


def test_a_transport_stream_joined_from_two_is_as_long_as_both(tmp_path, settings):
    write_video(tmp_path / "half.ts", codec="libx264")
    (tmp_path / "whole.ts").write_bytes((tmp_path / "half.ts").read_bytes() * 2)
    data = settings.data.model_copy(update={"fps": 1.0, "max_frames": 8})
    frames, rate = read_video(tmp_path / "whole.ts", data, 0.0, None)
    assert rate == pytest.approx(1)
    assert [brightness(frame) for frame in frames] == pytest.approx([5, 15, 25, 35] * 2, abs=1)


def test_a_film_of_one_frame_is_read(tmp_path, settings):
    for name in ("a.mp4", "a.ts", "a.mkv", "a.avi"):
        write_video(tmp_path / name, 1)
        assert len(read_video(tmp_path / name, settings.data, 0.0, None)[0]) == 2


def write_shown(path, stored, codec="mpeg4", turn=0, mirrored=False, aspect=1, form="yuv420p", stream_says=None):
    """Ten frames of this picture, and how players are told to show it: by the container, or by the stream."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *stored.shape[:2], form
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        if turn or mirrored:
            stream.set_display_rotation(turn, hflip=mirrored)
        told = stream_says and BitStreamFilterContext(f"h264_metadata=display_orientation=insert:{stream_says}", stream)
        frame = av.VideoFrame.from_ndarray(stored, "rgba" if stored.shape[2] == 4 else "rgb24")
        for packet in (one for shown in [*[frame] * 10, None] for one in stream.encode(shown)):
            container.mux(told.filter(packet) if told else packet)


def first_frame(path, settings, **change):
    frames, _ = read_video(path, settings.data.model_copy(update=change), 0.0, None)
    return Image.open(io.BytesIO(frames[0])).convert("L")


# Where ffmpeg shows the upper left corner of the stored pictures: as (right, below).
@pytest.mark.parametrize(
    ("turn", "mirrored", "corner"),
    [
        (0, False, (0, 0)),
        (-90, False, (1, 0)),
        (90, False, (0, 1)),
        (180, False, (1, 1)),
        (0, True, (1, 0)),
        (-90, True, (0, 0)),
        (90, True, (1, 1)),
        (180, True, (0, 1)),
    ],
)
def test_videos_are_turned_upright_and_mirrored(tmp_path, settings, turn, mirrored, corner):
    stored = np.full((56, 112, 3), 40, np.uint8)
    stored[:28, :56] = 220
    write_shown(tmp_path / "phone.mp4", stored, turn=turn, mirrored=mirrored)
    shown = first_frame(tmp_path / "phone.mp4", settings)
    assert shown.size == ((112, 56) if turn % 180 == 0 else (56, 112))
    quarters = np.asarray(shown.resize((2, 2), Image.Resampling.BOX))
    assert np.unravel_index(quarters.argmax(), (2, 2)) == corner[::-1]


@pytest.mark.parametrize(
    ("says", "corner"), [("rotate=-90", (1, 0)), ("rotate=180", (1, 1)), ("flip=horizontal", (1, 0))]
)
def test_all_frames_are_turned_as_the_stream_says_beside_its_key_frames(tmp_path, settings, says, corner):
    stored = np.full((112, 112, 3), 40, np.uint8)
    stored[:56, :56] = 220
    write_shown(tmp_path / "a.ts", stored, "libx264", stream_says=says)
    for frame in read_video(tmp_path / "a.ts", settings.data, 0.0, None)[0]:
        quarters = np.asarray(Image.open(io.BytesIO(frame)).convert("L").resize((2, 2), Image.Resampling.BOX))
        assert np.unravel_index(quarters.argmax(), (2, 2)) == corner[::-1]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.ts", "a.avi", "turned.mp4"])
@pytest.mark.parametrize("aspect", [Fraction(4, 3), Fraction(3, 4)])
def test_pixels_become_square(tmp_path, settings, name, aspect):
    """What is shown as a square is one."""
    stored = np.full((252, 336, 3), 40, np.uint8)
    wide = round(56 / aspect)
    stored[70:182, 168 - wide : 168 + wide] = 220
    write_shown(tmp_path / name, stored, turn=90 if name == "turned.mp4" else 0, aspect=aspect)
    shown = first_frame(tmp_path / name, settings, max_pixels=10**6)
    assert sorted(shown.size) == sorted((round(336 * aspect / 28) * 28, 252))
    bright = np.asarray(shown) > 130
    assert bright.any(0).sum() == pytest.approx(112, abs=4)
    assert bright.any(1).sum() == pytest.approx(112, abs=4)


def test_pixels_of_no_likely_shape_are_refused(tmp_path, settings):
    write_shown(tmp_path / "a.mp4", np.full((56, 560, 3), 40, np.uint8), "libx264", aspect=30)
    with pytest.raises(BadRecordError, match=r"expected a readable video, found .*a\.mp4 .*over 200 times the other"):
        first_frame(tmp_path / "a.mp4", settings)


def test_what_is_transparent_in_a_video_is_white(tmp_path, settings):
    stored = np.zeros((56, 112, 4), np.uint8)
    stored[:, 56:, 3] = 255
    write_shown(tmp_path / "a.mov", stored, "qtrle", form="argb")
    shown = np.asarray(first_frame(tmp_path / "a.mov", settings))
    assert shown[:, :50].min() > 240
    assert shown[:, 62:].max() < 20


@pytest.mark.parametrize("sizes", [((160, 120), (320, 240)), ((320, 240), (160, 120)), ((160, 120), (120, 160))])
def test_frames_are_of_one_size_where_a_stream_changes_it(tmp_path, settings, sizes):
    """As a call does when the other side turns the phone; what has another shape keeps it."""
    parts = []
    for size in sizes:
        write_video(tmp_path / "part.ts", 20, size=size, codec="libx264", step=0)
        parts.append((tmp_path / "part.ts").read_bytes())
    (tmp_path / "whole.ts").write_bytes(b"".join(parts))
    data = settings.data.model_copy(update={"fps": 1.0, "max_frames": 4, "max_pixels": 10**6})
    frames, _ = read_video(tmp_path / "whole.ts", data, 0.0, None)
    assert len({Image.open(io.BytesIO(frame)).size for frame in frames}) == 1


def test_a_stream_that_is_turned_keeps_its_shape(tmp_path, settings):
    stored = np.full((160, 120, 3), 220, np.uint8)
    write_video(tmp_path / "wide.ts", 20, codec="libx264", step=0)
    write_shown(tmp_path / "high.ts", stored, "libx264")
    (tmp_path / "whole.ts").write_bytes((tmp_path / "wide.ts").read_bytes() + (tmp_path / "high.ts").read_bytes())
    data = settings.data.model_copy(update={"fps": 1.0, "max_frames": 4, "max_pixels": 10**6})
    last = Image.open(io.BytesIO(read_video(tmp_path / "whole.ts", data, 0.0, None)[0][-1])).convert("L")
    assert last.size == (168, 112)
    assert (np.asarray(last) > 130).any(0).sum() == pytest.approx(168 * 90 / 160, abs=4)


def write_streams(path, *streams):
    """Pictures of a grey and their number, each in a stream of its own with this disposition."""
    with av.open(str(path), "w") as container:
        made = []
        for codec, form, _, _, disposition in streams:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt, stream.disposition = 112, 112, form, disposition
            made.append(stream)
        for stream, (_, _, grey, count, _) in zip(made, streams, strict=True):
            for _ in range(count):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((112, 112, 3), grey, np.uint8))))
            container.mux(stream.encode())


def test_pixels_that_change_their_shape_become_square(tmp_path, settings):
    """As on television, between films of 4:3 and of 16:9."""
    stored, parts = np.full((112, 112, 3), 220, np.uint8), []
    for aspect in (2, 1):
        write_shown(tmp_path / "part.ts", stored, "libx264", aspect=aspect)
        parts.append((tmp_path / "part.ts").read_bytes())
    (tmp_path / "whole.ts").write_bytes(b"".join(parts))
    data = settings.data.model_copy(update={"fps": 2.0, "max_frames": 4, "max_pixels": 10**6})
    shown = [Image.open(io.BytesIO(frame)) for frame in read_video(tmp_path / "whole.ts", data, 0.0, None)[0]]
    wide = [(np.asarray(one.convert("L")) > 130).any(0).sum() for one in shown]
    assert {one.size for one in shown} == {(224, 112)}
    assert wide == pytest.approx([224, 224, 112, 112], abs=4)


COVER, FILM = ("mjpeg", "yuvj420p", 220, 1), ("libx264", "yuv420p", 40, 20)
DEFAULT, PICTURE = Disposition.default, Disposition.attached_pic


@pytest.mark.parametrize(
    ("name", "streams"),
    {
        "a cover first": ("a.mkv", [(*COVER, 0), (*FILM, DEFAULT)]),
        "all by default": ("a.mkv", [(*COVER, DEFAULT), (*FILM, DEFAULT)]),
        "none by default": ("a.mkv", [(*COVER, 0), (*FILM, 0)]),
        "a cover alone by default": ("a.mkv", [(*COVER, DEFAULT), (*FILM, 0)]),
        "slides": ("a.mkv", [("mjpeg", "yuvj420p", 220, 3, 0), (*FILM, DEFAULT)]),
        "a cover by default": ("a.mp4", [(*COVER, DEFAULT), (*FILM, 0)]),
        "an attached cover": ("a.mp4", [(*COVER, PICTURE), (*FILM, DEFAULT)]),
        "another film first": ("a.mkv", [(*FILM[:2], 220, 20, 0), (*FILM, DEFAULT)]),
    }.values(),
)
def test_the_default_stream_that_is_no_cover_is_read(tmp_path, settings, name, streams):
    write_streams(tmp_path / name, *streams)
    frames, rate = read_video(tmp_path / name, settings.data, 0.0, None)
    assert len(frames) / rate == pytest.approx(2, abs=0.01)
    assert 5 * brightness(frames[0]) == pytest.approx(40, abs=2)


def test_a_song_with_a_cover_is_no_film(tmp_path, settings):
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        cover, sound = container.add_stream("mjpeg", rate=10), container.add_stream("aac", rate=16000)
        cover.width, cover.height, cover.pix_fmt, cover.disposition = 56, 56, "yuvj420p", PICTURE
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((56, 56, 3), np.uint8))))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux([*cover.encode(), *sound.encode(frame), *sound.encode()])
    with pytest.raises(BadRecordError, match=r"found .*song\.mp4 \(the file has no video stream\)"):
        read_video(tmp_path / "song.mp4", settings.data, 0.0, None)


@pytest.mark.parametrize(
    ("orientation", "corner"),
    enumerate([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0), (1, 0), (1, 1), (0, 1)], start=1),
)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_images_are_turned_upright_and_mirrored(settings, form, orientation, corner):
    stored, exif, buffer = Image.new("L", (112, 56), 40), Image.Exif(), io.BytesIO()
    stored.paste(220, (0, 0, 56, 28))
    exif[0x0112] = orientation
    stored.convert("RGB").save(buffer, form, exif=exif)
    shown = Image.open(io.BytesIO(read_image(buffer, settings.data))).convert("L")
    assert shown.size == ((112, 56) if orientation < 5 else (56, 112))
    quarters = np.asarray(shown.resize((2, 2), Image.Resampling.BOX))
    assert np.unravel_index(quarters.argmax(), (2, 2)) == corner[::-1]


def test_media_is_resized_within_the_budget_to_whole_visual_tokens(tmp_path, settings):
    (tmp_path / "wide.jpg").write_bytes(picture(0, width=640, height=360))
    data = settings.data.model_copy(update={"max_pixels": 12544})
    width, height = Image.open(io.BytesIO(read_image(tmp_path / "wide.jpg", data))).size
    assert width % 28 == height % 28 == 0
    assert width * height <= 12544
    assert width > height
