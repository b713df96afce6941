"""What can be wrong with a user's data: each case is one clear line, or, by choice, counted and left out."""

import io
import json
import logging
import os
import random
import struct
import zlib

import numpy as np
import pytest
from conftest import change, picture, run_stage, workspace
from PIL import Image
from test_sources import write_video

from firstsight.core.errors import UserError
from firstsight.readers import hub_dataset
from firstsight.readers.image_decoding import read_image
from firstsight.readers.problems import BadRecordError
from firstsight.records.parquet import Split
from firstsight.records.sample import SPLITS

GOOD = [
    {"id": f"good-{split}", "media": f"{split}.jpg", "question": "What?", "answer": "a cup", "split": split}
    for split in SPLITS
]


def line(**values) -> dict:
    return {"question": "What is it?", "answer": "a ball", "split": "train"} | values


def text(value: str):
    """A line as it stands in the file."""
    return lambda folder: value


def given(**values):
    """A line with these values."""
    return text(json.dumps(line(**values)))


def media(name: str, content: bytes, **values):
    """A line about a file with this content."""

    def write(folder):
        (folder / name).write_bytes(content)
        return line(media=name, **values)

    return write


def image(**options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", options.pop("size", (64, 64)), "red").save(buffer, **{"format": "JPEG"} | options)
    return buffer.getvalue()


def floats(*row: float) -> bytes:
    """A TIFF of these rows of floating point pixels."""
    buffer = io.BytesIO()
    Image.fromarray(np.repeat(np.float32([row]), 56, 1).repeat(56, 0)).save(buffer, "TIFF")
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, **chunks: bytes) -> bytes:
    """A PNG of these chunks, after its header."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    made = b"\x89PNG\r\n\x1a\n"
    for name, content in {"IHDR": header, **chunks, "IEND": b""}.items():
        chunk = name.encode() + content
        made += struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return made


def png_halves(depth: int, colour: int, left: bytes, right: bytes, transparent: bytes) -> bytes:
    """Pixels of these bytes, and the value that is transparent as a PNG stores it."""
    count = 56 * depth * (3 if colour == 2 else 1) // 8 // len(left)
    rows = (b"\0" + left * count + right * count) * 56
    return png(112, 56, depth, colour, tRNS=transparent, IDAT=zlib.compress(rows))


def chunk_of_no_name() -> bytes:
    """A PNG whose second chunk of pixels has a damaged name."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", (256, 256), random.Random(0).randbytes(3 * 256**2)).save(buffer, "PNG")
    first, second, rest = buffer.getvalue().split(b"IDAT", 2)
    return first + b"IDAT" + second + b"\x0e\xc2:p" + rest


def video(**options) -> bytes:
    path = options.pop("folder") / "made.mp4"
    write_video(path, **options)
    return path.read_bytes()


def clip(damage, **values):
    """A line about a video of 4 s at 10 frames a second, damaged."""

    def write(folder):
        (folder / "clip.mp4").write_bytes(damage(video(folder=folder)))
        return line(media="clip.mp4", **values)

    return write


def audio_only(folder):
    """A video file without pictures."""
    import av

    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return line(media="sound.mp4")


def link_outside(folder):
    outside = folder.parent / "outside.jpg"
    outside.write_bytes(picture(9))
    (folder / "link.jpg").symlink_to(outside)
    return line(media="link.jpg")


def linked_folder_outside(folder):
    outside = folder.parent / "elsewhere"
    outside.mkdir(exist_ok=True)
    (outside / "a.jpg").write_bytes(picture(9))
    (folder / "linked").symlink_to(outside)
    return line(media="linked/a.jpg")


def link_to_itself(folder):
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    return line(media="loop.jpg")


def absolute_outside(folder):
    outside = folder.parent / "outside.jpg"
    outside.write_bytes(picture(9))
    return line(media=str(outside))


def badly_named(folder):
    (folder / os.fsdecode(b"\xff.jpg")).write_bytes(picture(9))
    (folder / "link.jpg").symlink_to(os.fsdecode(b"\xff.jpg"))
    return line(media="link.jpg")


def fifo(folder):
    os.mkfifo(folder / "pipe.jpg")
    return line(media="pipe.jpg")


def device(folder):
    (folder / "zero.jpg").symlink_to("/dev/zero")
    return line(media="zero.jpg")


BAD = {
    # lines
    "broken JSON": (text('{"question": "What?", '), "expected a JSON object"),
    "no object": (text('["What?", "so"]'), "expected a JSON object"),
    "a bare number": (text("42"), "expected a JSON object"),
    "trailing comma": (text('{"question": "What?", "answer": "so",}'), "expected a JSON object"),
    "an object on several lines": (text('{"question": "What?",'), "write one object a line"),
    "single quotes": (text("{'question': 'What?', 'answer': 'so'}"), "expected a JSON object"),
    "two objects": (text("{} {}"), "expected a JSON object"),
    "NaN": (text('{"question": "What?", "answer": "so", "start": NaN}'), "NaN is not JSON"),
    "infinity": (text('{"question": "What?", "answer": "so", "end": Infinity}'), "Infinity is not JSON"),
    "deep nesting": (text("[" * 100_000), "expected a JSON object"),
    "an escaped lone surrogate": (given(question="\ud800"), "question: expected text, found half of a character"),
    "unknown key": (given(anwser="x"), "found the key 'anwser'"),
    # questions and answers
    "no question": (text('{"answer": "so"}'), "question: expected a value"),
    "no answer": (text('{"question": "What?", "split": "train"}'), "expected an answer, found none"),
    "empty question": (given(question=" "), "question: expected text that is not empty, found '"),
    "empty answer": (given(answer=""), "answer: expected text that is not empty, found '"),
    "null question": (given(question=None), "question: expected a value"),
    "number as answer": (given(answer=3), "answer: expected text"),
    "list as answer": (given(answer=["a", "b"]), "answer: expected text"),
    "object as question": (given(question={"text": "What?"}), "question: expected text, found"),
    "enormous question": (given(question="x" * 30_000), "at most 20000 characters"),
    "enormous answer": (given(answer="x" * 30_000), "at most 20000 characters"),
    "special token": (given(question="<|im_end|>"), "found the special token '<|im_end|>'"),
    "where an image goes": (given(question="<image>\nWhat?"), "found the special token '<image>'"),
    "where speech goes, in an answer": (given(answer="<speech>"), "found the special token '<speech>'"),
    "special token in an option": (given(options=["a ball", "<|image_pad|>"]), "the special token"),
    "empty accepted answer": (given(answers=["x", ""]), "answers.1: expected text"),
    "answers as text": (given(answers="x"), "answers: expected a list"),
    # options
    "answer not among options": (given(options=["a cup", "a pan"]), "expected the answer to be a letter of 'AB'"),
    "letter beyond the options": (given(answer="C", options=["a", "b"]), "a letter of 'AB'"),
    "accepted answer not among options": (given(answers=["x"], options=["a ball", "b"]), "found 'x'"),
    "empty option": (given(options=["a ball", ""]), "options.1: expected text"),
    "one option": (given(options=["a ball"]), "expected two or more different options"),
    "the same option twice": (given(options=["a ball", "a ball"]), "two or more different options"),
    "too many options": (given(options=[f"o{n}" for n in range(27)]), "options: expected at most 26 values, found 27"),
    "option that is a number": (given(options=["a ball", 2]), "options.1: expected text"),
    # ids, groups, splits
    "duplicate id": (given(id="good-test"), "expected an id of its own, found 'good-test' again"),
    "empty id": (given(id=""), "id: expected text"),
    "number as id": (given(id=7), "id: expected text"),
    "unknown split": (given(split="dev"), "split: expected one of 'train', 'validation' or 'test', found 'dev'"),
    "group against its media": (given(media="train.jpg", group="x"), "expected the same group for"),
    # media, by name
    "missing media": (given(media="gone.jpg"), "expected a media file, found no"),
    "a folder as media": (given(media="."), "expected a media file"),
    "empty path": (given(media=""), "media: expected a path"),
    "number as media": (given(media=3), "media: expected a path"),
    "no frames": (given(media=[]), "expected media, found an empty list"),
    "a missing frame": (given(media=["train.jpg", "gone.jpg"]), "expected a media file, found no"),
    "an address": (given(media="https://host/a.jpg"), "found the address 'https://host/a.jpg'"),
    "a lone surrogate in a path": (given(media="\udc80.jpg"), "expected a media file, found '\\udc80.jpg'"),
    "a name that is no UTF-8": (badly_named, "expected a media file, found 'link.jpg'"),
    "nul in the path": (given(media="a\0b.jpg"), "expected a media file"),
    "too long a path": (given(media="x" * 5000 + ".jpg"), "expected a media file"),
    "path traversal": (given(media="../../../../../../etc/passwd"), "expected media below"),
    "absolute path outside": (absolute_outside, "expected media below"),
    "symlink outside": (link_outside, "expected media below"),
    "linked folder outside": (linked_folder_outside, "expected media below"),
    "symlink to itself": (link_to_itself, "expected a media file"),
    "a pipe as media": (fifo, "expected a media file"),
    "a device as media": (device, "expected media below"),
    # images
    "zero bytes": (media("a.jpg", b""), "expected a readable image"),
    "text as image": (media("a.jpg", b"not an image"), "expected a readable image"),
    "truncated JPEG": (media("a.jpg", image(quality=100)[:-200]), "expected a readable image"),
    "truncated PNG": (media("a.png", image(format="PNG")[:-30]), "expected a readable image"),
    "a chunk of no name in a PNG": (media("a.png", chunk_of_no_name()), "(broken PNG file (chunk"),
    "truncated AVIF": (media("a.avif", image(format="AVIF")[:-3]), "Truncated data"),
    "damaged AVIF": (media("a.avif", image(format="AVIF").replace(b"pitm", b"xxxx")), "(Failed to decode image"),
    "a TIFF of no strips": (media("a.tif", image(format="TIFF").replace(b"\x11\x01", b"\xff\xff")), "a readable image"),
    "a line break in a name": (media("a\nb.jpg", b""), "found a\\nb.jpg (of no known format"),
    "only a header": (media("a.jpg", image()[:20]), "expected a readable image"),
    "decompression bomb": (media("a.png", png(60_000, 60_000, 8, 2)), "expected a readable image"),
    "sides of zero": (media("a.png", png(0, 10, 8, 2)), "expected a readable image"),
    "too long and thin": (media("a.png", image(format="PNG", size=(2000, 4))), "expected a readable image"),
    "svg": (media("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "expected a readable image"),
    "pixels beyond white": (media("a.tif", floats(0, 300)), "with pixels from 0 to 300, where 0 to 1 or"),
    "pixels that are no number": (media("a.tif", floats(0, np.nan)), "expected a readable image"),
    "window of an image": (given(media="train.jpg", start=1), "expected start and end with a video"),
    "a video by another suffix": (media("a.ogv", b"OggS"), "a video's name ends in .3gp, .avi"),
    "window of what is no video by name": (media("a.ogv", b"OggS", start=1), "a video's name ends in .3gp, .avi"),
    # videos
    "zero bytes of video": (clip(lambda content: b""), "expected a readable video"),
    "text as video": (clip(lambda content: b"not a video" * 100), "expected a readable video"),
    "truncated video": (clip(lambda content: content[: len(content) // 2]), "expected a readable video"),
    "an image named as a video": (clip(lambda content: image(format="PNG")[:40]), "expected a readable video"),
    "video without frames": (audio_only, "(the file has no video stream)"),
    "window beyond the end": (clip(bytes, start=9), "expected a window within the 4.00 s"),
    "window that ends before it starts": (clip(bytes, start=3, end=2), "expected a window within"),
    "window of no length": (clip(bytes, start=2, end=2), "expected a window within"),
    "negative start": (clip(bytes, start=-1), "start: expected seconds"),
    "start as text": (clip(bytes, start="1"), "start: expected seconds"),
    "start beyond all numbers": (clip(bytes, start=10**400), "start: expected seconds, found 1000"),
    "end of a billion years": (clip(bytes, end=1e16), "end: expected seconds, found 1e+16"),
    "window without media": (given(start=1), "start and end with a video alone"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "work").mkdir()
    folder = workspace(tmp_path / "work")
    change(folder, "data", source="jsonl", path="qa.jsonl")
    for number, split in enumerate(SPLITS):
        (folder / f"{split}.jpg").write_bytes(picture(number))
    return folder


def learnt(folder):
    """The pictures of the line that is not one of the good ones."""
    split = Split(folder / "data/egoqa/train.parquet")
    return next(sample for sample in split if sample.records[0].answer == "a ball").images()


def build(folder, *lines, good=GOOD):
    texts = [one if isinstance(one, str) else json.dumps(one) for one in (*good, *lines)]
    (folder / "qa.jsonl").write_bytes("\n".join(texts).encode("utf-8", "surrogatepass"))
    run_stage(folder, "build_egoqa_dataset")
    return json.loads((folder / "data/egoqa/card.json").read_text())


@pytest.mark.parametrize("case", BAD)
def test_bad_data_ends_in_one_line_or_is_skipped_and_listed(folder, case):
    make, message = BAD[case]
    bad = make(folder)
    with pytest.raises(UserError) as error:
        build(folder, bad)
    said = str(error.value)
    assert "\n" not in said
    assert len(said) < 600
    assert said.startswith("qa.jsonl: line 4: ")
    assert message in said
    assert not (folder / "data/egoqa").exists()

    change(folder, "data", on_error="skip")
    card = build(folder, bad)
    assert card["problems"]["count"] == 1
    (listed,) = card["problems"]["first"]
    assert listed.startswith("qa.jsonl: line 4: ")
    assert message in listed
    assert {split: card["splits"][split]["records"] for split in SPLITS} == dict.fromkeys(SPLITS, 1)


def test_there_are_sixty_cases():
    assert len(BAD) >= 60


FINE = {
    "greyscale": ("L", "PNG"),
    "palette": ("P", "PNG"),
    "transparency": ("RGBA", "PNG"),
    "grey with transparency": ("LA", "PNG"),
    "CMYK": ("CMYK", "JPEG"),
    "16 bits": ("I;16", "PNG"),
    "black and white": ("1", "PNG"),
    "floating point": ("F", "TIFF"),
    "floating point to 1": ("F", "TIFF"),
    "animated": ("P", "GIF"),
}


@pytest.mark.parametrize("case", FINE)
def test_unusual_images_are_read_as_they_look(folder, case):
    """A bright half and a dark half stay so, whatever the mode."""
    mode, form = FINE[case]
    grey = np.full((56, 112), 40, np.uint8)
    grey[:, 56:] = 220
    made = Image.fromarray(grey)
    if mode == "I;16":
        made = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "F":
        made = Image.fromarray(grey.astype(np.float32) / (255 if case.endswith("to 1") else 1))
    elif mode == "CMYK":
        made = made.convert("RGB").convert("CMYK")
    elif mode == "1":
        made = made.point(lambda value: 255 * (value > 128)).convert("1")
    else:
        made = made.convert("RGB").convert(mode)
    # A wrong extension does not matter: the content says what it is.
    made.save(folder / "odd.jpg", form)
    build(folder, line(media="odd.jpg"))
    (shown,) = learnt(folder)
    left, right = (
        np.asarray(part, float).mean() for part in (shown.crop((0, 0, 50, 56)), shown.crop((62, 0, 112, 56)))
    )
    assert (left < 60, right > 200) == (True, True)


def two_halves(mode: str, **options) -> bytes:
    """The left half is transparent over black, the right half dark."""
    left, right = {"RGB": ((0, 0, 0), (40, 40, 40)), "1": (0, 1)}.get(mode, (0, 40))
    made = Image.new(mode, (112, 56), left)
    made.paste(right, (56, 0, 112, 56))
    buffer = io.BytesIO()
    made.save(buffer, options.pop("format", "PNG"), **options)
    return buffer.getvalue()


def alpha(mode: str, form: str) -> bytes:
    buffer = io.BytesIO()
    made = Image.new("RGBA", (112, 56))
    made.paste((40, 40, 40, 255), (56, 0, 112, 56))
    (made if mode == "RGBA" else made.convert(mode)).save(buffer, form)
    return buffer.getvalue()


TRANSPARENT = {
    "palette": two_halves("P", transparency=0),
    "palette by shares": two_halves("P", transparency=bytes([0, *[255] * 255])),
    "palette GIF": two_halves("P", format="GIF", transparency=0),
    "grey": two_halves("L", transparency=0),
    "2 bits": png_halves(2, 0, b"U", b"\0", b"\0\1"),
    "4 bits": png_halves(4, 0, b"w", b"\x11", b"\0\7"),
    "16 bits a colour": png_halves(16, 2, b"\1\2", b"((", b"\1\2" * 3),
    "16 bits": two_halves("I;16", transparency=0).replace(b"\0(", b"(("),
    "black and white": two_halves("1", transparency=0),
    "a colour": two_halves("RGB", transparency=(0, 0, 0)),
    "grey channel": alpha("LA", "PNG"),
    "grey channel TIFF": alpha("LA", "TIFF"),
    "channel": alpha("RGBA", "PNG"),
    "channel WebP": alpha("RGBA", "WEBP"),
    "channel AVIF": alpha("RGBA", "AVIF"),
    "channel JPEG 2000": alpha("RGBA", "JPEG2000"),
}


@pytest.mark.parametrize("case", TRANSPARENT)
def test_transparency_is_white_in_every_mode(settings, case):
    shown = Image.open(io.BytesIO(read_image(io.BytesIO(TRANSPARENT[case]), settings.data))).convert("L")
    left, right = (np.asarray(shown.crop((at, 8, at + 40, 48)), float).mean() for at in (8, 64))
    assert left > 250
    assert right > 250 if case == "black and white" else right < 50


@pytest.mark.parametrize("exif", [b"\x00\x08\x00\x02\x01\x12\x00\x03", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"\xff" * 40])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_an_image_with_damaged_tags_is_read(settings, form, exif):
    found = read_image(io.BytesIO(image(format=form, exif=exif, size=(56, 112))), settings.data)
    assert Image.open(io.BytesIO(found)).size == (56, 112)


def test_an_image_held_upright_is_turned(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = Image.new("L", (112, 56), 40)
    grey.paste(220, (56, 0, 112, 56))
    grey.save(folder / "turned.jpg", exif=exif)
    build(folder, line(media="turned.jpg"))
    (shown,) = learnt(folder)
    assert shown.size == (56, 112)
    assert np.asarray(shown.crop((0, 60, 56, 112)), float).mean() > 200


def test_with_nothing_left_the_first_problem_is_said(folder):
    change(folder, "data", on_error="skip")
    with pytest.raises(
        UserError, match=r"none in train, .* 3 records could not be used, first: qa\.jsonl: line 1: .*gone"
    ):
        build(folder, good=[one | {"media": "gone.jpg"} for one in GOOD])


def test_invalid_utf8_is_named(folder):
    (folder / "qa.jsonl").write_bytes(b'{"question": "\xff", "answer": "so"}\n')
    with pytest.raises(UserError, match=r"expected a JSON Lines file in UTF-8, found qa\.jsonl"):
        run_stage(folder, "build_egoqa_dataset")


def test_a_build_is_deterministic(folder):
    build(folder)
    first = {split: (folder / f"data/egoqa/{split}.parquet").read_bytes() for split in SPLITS}
    build(folder)
    assert first == {split: (folder / f"data/egoqa/{split}.parquet").read_bytes() for split in SPLITS}


def test_an_interrupted_build_goes_on(folder, monkeypatch):
    """What has been decoded is not decoded again; what has changed since, is."""
    from firstsight.readers import media

    lines = [line(media=f"{n}.jpg", id=f"n{n}") for n in range(40)]
    for n in range(40):
        (folder / f"{n}.jpg").write_bytes(picture(100 + n))
    (folder / "39.jpg").write_bytes(b"broken")
    read, seen = media.read_image, []

    def counted(path, data):
        seen.append(path.name)
        return read(path, data)

    monkeypatch.setattr(media, "read_image", counted)
    with pytest.raises(UserError, match=r"line 43: expected a readable image"):
        build(folder, *lines)
    assert len(seen) == 43
    seen.clear()
    (folder / "39.jpg").write_bytes(picture(139))
    (folder / "0.jpg").write_bytes(picture(777))
    assert build(folder, *lines)["splits"]["train"]["records"] == 41
    assert len(seen) == 16 + 11  # the first chunk and the last, of sixteen
    assert not any((folder / ".scratch").glob("build*"))


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content.replace(b"JFIF", b"XXXX", 1)])
def test_a_damaged_chunk_of_an_interrupted_build_is_decoded_again(folder, monkeypatch, damage):
    build(folder)
    expected = (folder / "data/egoqa/train.parquet").read_bytes()
    monkeypatch.setattr("stages.build_egoqa_dataset.write", lambda *_: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        build(folder)
    monkeypatch.undo()
    (chunk,) = (folder / ".scratch").rglob("*.parquet")
    assert b"JFIF" in chunk.read_bytes()
    chunk.write_bytes(damage(chunk.read_bytes()))
    build(folder)
    assert (folder / "data/egoqa/train.parquet").read_bytes() == expected


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_what_has_been_mended_is_decoded_again(folder, monkeypatch, policy):
    """Though the file is the same, as when it was not to be read by this user, or a disk was away."""
    from firstsight.readers import media

    read = media.read_image
    change(folder, "data", on_error=policy)

    def refused(path, data):
        raise BadRecordError("Permission denied")

    monkeypatch.setattr(media, "read_image", refused)
    with pytest.raises(UserError, match="Permission denied"):
        build(folder)
    monkeypatch.setattr(media, "read_image", read)
    assert build(folder)["splits"]["train"]["records"] == 1


def test_a_text_that_is_no_utf8_says_how_to_save_it(folder):
    change(folder, "data", source="csv", path="qa.csv")
    for encoding in ("utf-16", "cp1252"):
        (folder / "qa.csv").write_bytes("question,answer\nWas hält sie?,x\n".encode(encoding))
        with pytest.raises(UserError, match=r"expected a CSV file in UTF-8, .*save it as UTF-8 .*as CSV UTF-8"):
            run_stage(folder, "build_egoqa_dataset")


def test_the_same_picture_in_train_and_test_is_left_out_of_train(folder):
    shown = Image.open(folder / "test.jpg")
    shown.save(folder / "copy.jpg", quality=60)
    shown.resize((110, 110)).save(folder / "larger.png")
    card = build(folder, line(media="copy.jpg"), line(media="larger.png", split="validation"))
    assert card["dropped"] == {"media of another split": 2}
    assert card["splits"]["train"]["records"] == 1


def test_windows_of_a_copy_are_left_out_with_it(folder):
    """And other media of a group that has one; what looks like nothing in the test split, on its own."""
    write_video(folder / "t.mp4")
    for name in ("copy.mp4", "x.mp4"):
        (folder / name).write_bytes((folder / "t.mp4").read_bytes())
    (folder / "other.jpg").write_bytes(picture(50))
    lines = [
        line(media="t.mp4", split="test"),
        line(media="copy.mp4"),
        line(media="copy.mp4", start=1, end=2),
        line(media="x.mp4", group="home"),
        line(media="other.jpg", group="home", split="train"),
    ]
    card = build(folder, *lines)
    assert card["dropped"] == {"media of another split": 4}
    assert {split: card["splits"][split]["records"] for split in SPLITS} == {"train": 1, "validation": 1, "test": 2}


def test_another_window_of_a_video_of_the_benchmark_is_not_learnt_from(folder):
    """Whatever the two files call it, and though it looks like another."""
    write_video(folder / "clip.mp4")
    (folder / "other").mkdir()
    (folder / "other/link.mp4").symlink_to("../clip.mp4")
    asked = {"media": "other/link.mp4", "start": 3, "end": 4, "question": "What?", "answer": "so"}
    (folder / "other/benchmark.jsonl").write_text(json.dumps(asked))
    change(folder, "data", benchmark={"source": "jsonl", "path": "other/benchmark.jsonl", "media_root": "."})
    card = build(folder, line(media="clip.mp4", start=0, end=1))
    assert card["dropped"] == {"media of the benchmark": 1}
    assert {split: card["splits"][split]["records"] for split in SPLITS} == {"train": 1, "validation": 1, "test": 2}


def test_a_question_in_two_splits_stays_in_the_one_that_is_held_back(folder):
    """Text alone, which no looks tell."""
    text = {"question": "What is a cup for?", "answer": "drinking"}
    lines = [text | {"split": split, "group": split, "id": split} for split in SPLITS]
    assert build(folder, *lines)["dropped"] == {"duplicate": 2}
    (alone,) = [sample for sample in Split(folder / "data/egoqa/test.parquet") if not sample.frames]
    assert alone.records[0].id == "test"


def test_a_split_left_empty_says_what_was_left_out(folder):
    with pytest.raises(UserError, match=r"none in train \(of .*; left out: 1 group of another split$"):
        build(folder, good=[GOOD[0] | {"media": "test.jpg"}, *GOOD[1:]])


def test_fewer_records_than_asked_for_are_told(folder, caplog):
    change(folder, "data", on_error="skip", train_samples=3, test_samples=1)
    (folder / "broken.jpg").write_bytes(b"broken")
    (folder / "a.jpg").write_bytes(picture(60))
    logging.getLogger("firstsight").addHandler(caplog.handler)
    card = build(folder, line(media="broken.jpg"), line(media="a.jpg"))
    logging.getLogger("firstsight").removeHandler(caplog.handler)
    assert "data.train_samples: 3 records were asked for, and only 2 found" in caplog.text
    assert "data.test_samples" not in caplog.text
    assert [card["splits"][split].get("asked_for") for split in SPLITS] == [3, None, 1]


def test_a_question_about_the_same_frames_is_asked_once_whatever_their_name(folder):
    (folder / "again.jpg").write_bytes((folder / "train.jpg").read_bytes())
    text = {"question": "What is a cup for?", "answer": "drinking", "split": "train"}
    card = build(folder, line(media="again.jpg", question="What?"), line(media="again.jpg"), text, text)
    assert card["dropped"] == {"another answer to the same question": 1, "duplicate": 1}
    assert card["splits"]["train"]["records"] == 3


def test_the_commit_of_a_data_set_of_the_hub_is_in_the_card(folder, monkeypatch):
    rows = [{"question": f"What {split}?", "answer": "so", "split": split} for split in SPLITS]
    (folder / "set").mkdir()
    (folder / "set/data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields = {name: name for name in rows[0]}
    asked = {"id": "set", "config": None, "revision": None, "splits": {"train": "by group"}, "fields": fields}
    change(folder, "data", source="hub", hub=asked)
    monkeypatch.setattr(hub_dataset, "commit", lambda _: "c0ffee")
    assert build(folder)["commit"] == "c0ffee"


def test_workers_decode_as_one_process_does(folder):
    lines = [line(media=f"{n}.jpg", id=f"n{n}") for n in range(300)]
    for n in range(300):
        (folder / f"{n}.jpg").write_bytes(picture(100 + n))
    (folder / "7.jpg").write_bytes(b"broken")
    change(folder, "data", on_error="skip")
    card = build(folder, *lines)
    (listed,) = card["problems"]["first"]
    assert listed.startswith("qa.jsonl: line 11: expected a readable image, found 7.jpg")
    split = Split(folder / "data/egoqa/train.parquet")
    assert [sample.records[0].id for sample in split] == ["good-train", *(f"n{n}" for n in range(300) if n != 7)]
