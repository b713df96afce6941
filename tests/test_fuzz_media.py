"""Damaged files of every format: each is read, or refused in one line that names it."""

import io
import random
import warnings

import numpy as np
import pytest
from conftest import picture
from PIL import Image
from test_sources import write_video

from firstsight.readers.media import files
from firstsight.readers.problems import BadRecordError

# Format of Pillow, mode and options.
IMAGES = {
    "jpeg": ("JPEG", "RGB", {}),
    "progressive jpeg": ("JPEG", "RGB", {"progressive": True}),
    "jpeg of four colours": ("JPEG", "CMYK", {}),
    "png": ("PNG", "RGB", {}),
    "palette png": ("PNG", "P", {"transparency": 3}),
    "grey png": ("PNG", "LA", {}),
    "16-bit png": ("PNG", "I;16", {}),
    "animated png": ("PNG", "RGBA", {"save_all": True}),
    "gif": ("GIF", "P", {"save_all": True, "transparency": 3}),
    "bmp": ("BMP", "RGB", {}),
    "tiff": ("TIFF", "RGB", {}),
    "float tiff": ("TIFF", "F", {}),
    "lzw tiff": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "jpeg tiff": ("TIFF", "RGB", {"compression": "jpeg"}),
    "fax tiff": ("TIFF", "1", {"compression": "group4"}),
    "webp": ("WEBP", "RGBA", {"save_all": True}),
    "lossless webp": ("WEBP", "RGB", {"lossless": True}),
    "avif": ("AVIF", "RGBA", {}),
    "jpeg 2000": ("JPEG2000", "RGB", {}),
    "ppm": ("PPM", "RGB", {}),
    "tga": ("TGA", "RGB", {"compression": "tga_rle"}),
    "ico": ("ICO", "RGBA", {}),
    "pcx": ("PCX", "RGB", {}),
    "sgi": ("SGI", "RGB", {}),
}
# Codec, and seconds of sound.
VIDEOS = {
    "mp4": ("libx264", 2),
    "mov": ("mpeg4", 2),
    "m4v": ("mpeg4", 0),
    "3gp": ("libx264", 2),
    "mkv": ("libx264", 2),
    "webm": ("libvpx", 0),
    "avi": ("mpeg4", 2),
    "mpg": ("mpeg2video", 0),
    "ts": ("libx264", 2),
    "mts": ("mpeg4", 2),
    "m2ts": ("libx264", 0),
    "flv": ("flv", 2),
    "wmv": ("wmv2", 0),
}


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The content cut off, or with bytes changed, zeroed, left out or repeated."""
    made, size = bytearray(content), len(content)
    at, length = chance.randrange(size), chance.randrange(1, max(2, size // 4))
    match chance.choice(("cut", "change", "change", "change", "header", "zero", "without", "repeat")):
        case "cut":
            del made[at:]
        case "change":
            for _ in range(chance.choice((1, 3, 20))):
                made[chance.randrange(size)] = chance.randrange(256)
        case "header":
            for _ in range(3):
                made[chance.randrange(min(size, 200))] = chance.choice((0, 1, 127, 128, 255))
        case "zero":
            made[at : at + length] = bytes(len(made[at : at + length]))
        case "without":
            del made[at : at + length]
        case "repeat":
            made[at:at] = made[at : at + length]
    return bytes(made)


def as_image(form: str, mode: str, options: dict) -> bytes:
    buffer = io.BytesIO()
    shown = Image.open(io.BytesIO(picture(1, 56, 56)))
    made = Image.fromarray(np.asarray(shown.convert("L"), np.uint16) * 257) if mode == "I;16" else shown.convert(mode)
    more = {"append_images": [made.rotate(90)]} if "save_all" in options else {}
    exif = {"exif": bytes.fromhex("4d4d002a00000008000101120003000000010006000000000000")} if form in EXIF else {}
    made.save(buffer, form, **options | more | exif)
    return buffer.getvalue()


EXIF = ("JPEG", "PNG", "WEBP", "AVIF")


def check(folder, settings, name: str, content: bytes, seeds: range) -> None:
    data = settings.data.model_copy(update={"max_frames": 4})
    (folder / name).write_bytes(content)
    assert files(folder, name).load(data).frames
    for seed in seeds:
        (folder / name).write_bytes(damaged(content, random.Random(f"{name} {seed}")))
        try:
            with warnings.catch_warnings(action="ignore"):
                assert files(folder, name).load(data).frames
        except BadRecordError as error:
            assert name in str(error), seed
            assert len(str(error).splitlines()) == 1, seed


@pytest.mark.slow
@pytest.mark.parametrize("case", IMAGES)
def test_a_damaged_image_is_read_or_named(tmp_path, settings, case):
    form, mode, options = IMAGES[case]
    check(tmp_path, settings, f"{case}.img", as_image(form, mode, options), range(400))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", VIDEOS)
def test_a_damaged_video_is_read_or_named(tmp_path, settings, suffix):
    (codec, sound), path = VIDEOS[suffix], tmp_path / f"clip.{suffix}"
    write_video(path, codec=codec, frames=20, rate=25 if suffix == "mpg" else 10, size=(64, 48), sound=sound)
    check(tmp_path, settings, path.name, path.read_bytes(), range(200))
