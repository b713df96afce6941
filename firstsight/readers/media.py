"""Decode, sample and resize images and videos to JPEG frames, once, when the data set is built."""

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from qwen_vl_utils import fetch_image

from firstsight.core.params import Data
from firstsight.readers.problems import BadRecordError, reason
from firstsight.readers.source_record import DecodedMedia
from firstsight.records.sample import MediaKind

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".3gp", ".wmv", ".flv"}
)
_VIDEOS = f"a video's name ends in {', '.join(sorted(VIDEO_SUFFIXES))}"
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})


@dataclass(frozen=True)
class Files:
    """Name an image file, a video file or a list of frame files, below `root`.

    `names` are paths relative to the root with symbolic links resolved, so that a file has one name; `called` are the
    names that the source uses. `start` and `end` are a window of a video in seconds; an `end` of None is the video's
    end.
    """

    kind: MediaKind
    root: Path
    names: tuple[str, ...]
    start: float = 0.0
    end: float | None = None
    called: tuple[str, ...] = field(default=(), compare=False)

    def key(self) -> str:
        window = (self.start, self.end) if self.kind == "video" else ()
        return json.dumps([*self.names, *window], ensure_ascii=False)

    def group(self) -> tuple[str, ...]:
        return self.names

    def titles(self) -> tuple[str, ...]:
        return (*self.names, *self.called)

    def origins(self) -> tuple[str, ...]:
        return tuple(str(self.root.resolve() / name) for name in self.names)

    def stamp(self) -> object:
        found = [(self.root / name).stat() for name in self.names]
        return [str(self.root), *((one.st_size, one.st_mtime_ns) for one in found)]

    def load(self, data: Data) -> DecodedMedia:
        paths = [self.root / name for name in self.names]
        if self.kind == "video":
            return DecodedMedia(*read_video(paths[0], data, self.start, self.end))
        return DecodedMedia(tuple(read_image(path, data) for path in paths))


def files(root: Path, media: str | Sequence[str], start: float | None = None, end: float | None = None) -> Files:
    """Return the media at paths relative to `root`, or absolute and below it: a list of frames, a video or an image.

    A single path is a video if it has a suffix of `VIDEO_SUFFIXES`, and else an image.

    Raises:
        BadRecordError: a file is missing or not below `root`, or a window is given for something that is not a video.
    """
    names = [media] if isinstance(media, str) else list(media)
    if not names:
        raise BadRecordError("expected media, found an empty list; name files, or remove the record")
    inside = tuple(_inside(root, name) for name in names)
    if not isinstance(media, str):
        kind = "frames"
    else:
        kind = "video" if Path(media).suffix.lower() in VIDEO_SUFFIXES else "image"
    if kind != "video" and (start or end):
        raise BadRecordError(
            f"expected start and end with a video alone, found them with media {str(media)[:80]!r}; "
            f"remove them ({_VIDEOS})"
        )
    return Files(kind, root, inside, float(start or 0), None if end is None else float(end), tuple(names))


def _inside(root: Path, name: str) -> str:
    """Return a file's path relative to `root` with links resolved. Raise BadRecordError if it is missing or outside."""
    if "://" in name:
        raise BadRecordError(
            f"expected a path, found the address {name[:80]!r}, which is not downloaded; download it and give its path"
        )
    try:
        resolved, base = (root / name).resolve(), root.resolve()
        found = resolved.is_file()
        inside = resolved.relative_to(base).as_posix() if resolved.is_relative_to(base) else None
        f"{name}{resolved}".encode()  # raises for names that cannot be written as UTF-8
    except (OSError, ValueError, RuntimeError) as error:
        raise BadRecordError(
            f"expected a media file, found {name[:80]!r} ({str(error)[:80]}); correct the path"
        ) from None
    if inside is None:
        raise BadRecordError(
            f"expected media below {root}, found {name[:80]!r}, which is {resolved}; "
            "move it there, or set media_root to a folder that holds all media"
        )
    if not found:
        raise BadRecordError(
            f"expected a media file, found no {root / name}; correct the path (it is relative to {root}), "
            "or remove the record"
        )
    return inside


def first_there(root: Path, names: Sequence[str]) -> str:
    """Return the first of `names` that is a file below `root`, else the first, which `files` then reports missing."""
    return next((name for name in names if os.path.isfile(root / name)), names[0])  # noqa: PTH113, Path.is_file raises


def encode(image: Image.Image, data: Data) -> bytes:
    """Return a JPEG of the image, resized to at most `data.max_pixels` and sides divisible by 28 (one visual token)."""
    buffer = io.BytesIO()
    # fetch_image puts RGBA on white, and ignores the transparency of other modes.
    shown = image.convert("RGBA") if image.has_transparency_data else image
    described: dict[str, Any] = {"image": shown, "max_pixels": data.max_pixels}
    fetch_image(described).save(buffer, "JPEG", quality=data.jpeg_quality)
    return buffer.getvalue()


def read_image(path: Path | BinaryIO, data: Data, name: str | None = None) -> bytes:
    """Return one image file as resized JPEG bytes. Errors call it `name`, by default the path.

    Raises:
        BadRecordError: the image cannot be read.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return encode(_eight_bits(_as_held(image)), data)
    except UnidentifiedImageError:
        raise BadRecordError(
            f"expected a readable image, found {name or path} (of no known format; {_VIDEOS}); repair or remove it"
        ) from None
    except Exception as error:  # over a damaged file, decoders raise anything
        raise BadRecordError(
            f"expected a readable image, found {name or path} ({reason(error)}); repair or remove it"
        ) from None


def _as_held(image: Image.Image) -> Image.Image:
    """Return the image turned upright: a camera held so stores it on its side, with its orientation in an EXIF tag."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the tags are damaged, not the image
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale an image of more than 8 bits a channel to 8, because Pillow would clip values above 255.

    Raises ValueError when floating-point pixels are outside of 0 to 255.
    """
    if image.mode.startswith("I"):
        scaled = image.convert("I").point(lambda value: value / 256).convert("L")
        # In a grey image, one of its values may stand for transparency.
        transparent = scaled.info.pop("transparency", None)
        if transparent is not None:
            scaled.putalpha(Image.fromarray(np.asarray(image) != transparent))
        return scaled
    if image.mode == "F":
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if not 0 <= low <= high <= 255:
            raise ValueError(f"with pixels from {low:g} to {high:g}, where 0 to 1 or 0 to 255 is expected")
        return image.point(lambda value: value * 255) if high <= 1 else image
    return image


def read_video(path: Path, data: Data, start: float, end: float | None) -> tuple[tuple[bytes, ...], float]:
    """Return evenly spaced JPEG frames between `start` and `end` seconds (None: the video's end), and their rate per
    second.

    The number of frames follows from `data.fps`, is at least two and at most `data.max_frames`, and is even, because
    Qwen2-VL merges frames in pairs. The window is cut into as many equal parts, and each frame is the one on show at
    the middle of its part.

    Raises:
        BadRecordError: the video cannot be read, or the window is outside of it.
    """
    try:
        with av.open(str(path)) as container:
            stream = _video_stream(container)
            stream.thread_type = "AUTO"
            length = _length(container, stream)
            if not 0 <= start < min(end or length, length):
                raise BadRecordError(
                    f"expected a window within the {length:.2f} s of {path}, "
                    f"found {start:g} to {end or length:g} s; correct start and end"
                )
            seconds = min(end or length, length) - start
            count = int(np.clip(round(seconds * data.fps / 2) * 2, 2, data.max_frames // 2 * 2))
            times = start + (np.arange(count) + 0.5) * seconds / count
            return tuple(encode(frame, data) for frame in _frames_at(container, stream, times)), count / seconds
    except BadRecordError:
        raise
    except Exception as error:
        raise BadRecordError(
            f"expected a readable video, found {path} ({reason(error)}); repair or remove it"
        ) from None


def frame_rate(path: Path) -> float:
    """Return the average number of frames per second of a video.

    Raises:
        BadRecordError: the video cannot be read.
    """
    try:
        with av.open(str(path)) as container:
            return float(_video_stream(container).average_rate)
    except Exception as error:
        raise BadRecordError(
            f"expected a readable video, found {path} ({reason(error)}); repair or remove it"
        ) from None


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    if not container.streams.video:
        raise ValueError("the file has no video stream")
    return container.streams.video[0]


def _length(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Return the seconds from the first frame to the end of the last, from the packets after the last key frame, or
    all.

    The length in a file's header cannot be used: Matroska has none for a stream, and the container's is that of the
    longest stream, which may be sound that begins earlier or ends later.
    """
    start, said = stream.start_time or 0, container.duration or 0
    for place in (start + int(said / av.time_base / stream.time_base), start):
        container.seek(place, stream=stream)
        packets = (one for one in container.demux(stream) if one.pts is not None and not one.is_discard)
        if ends := [one.pts + (one.duration or 0) for one in packets]:
            return float((max(ends) - start) * stream.time_base)
    raise ValueError("no frame has a time stamp")


def _frames_at(
    container: av.container.InputContainer, stream: av.VideoStream, times: np.ndarray
) -> Iterator[Image.Image]:
    """Yield the frame on show at each of the ascending `times` (s), decoding once from the key frame before them."""
    origin = float((stream.start_time or 0) * stream.time_base)
    container.seek(int((origin + times[0]) / stream.time_base), stream=stream)
    wanted, shown = list(times), None
    for frame in container.decode(stream):
        while wanted and shown is not None and frame.time - origin > wanted[0]:
            wanted.pop(0)
            yield _upright(shown)
        if not wanted:
            return
        shown = frame
    if shown is None:
        raise ValueError("no frame could be decoded")
    for _ in wanted:
        yield _upright(shown)


def _upright(frame: av.VideoFrame) -> Image.Image:
    """Return the frame as players show it: a camera held upright stores its frames on their side, with a rotation."""
    turns = round(frame.rotation / 90) % 4  # anticlockwise
    return frame.to_image().rotate(90 * turns, expand=True)
