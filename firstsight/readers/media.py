"""Decode, sample and resize images and videos to JPEG frames, once, when the data set is built."""

import io
import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate, chain, dropwhile, islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from PIL import Image, ImageOps, UnidentifiedImageError
from qwen_vl_utils import fetch_image, smart_resize

from firstsight.core.params import Data
from firstsight.readers.problems import BadRecordError, reason
from firstsight.readers.source_record import DecodedMedia
from firstsight.records.sample import MediaKind

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".3gp", ".wmv", ".flv"}
)
_VIDEOS = f"a video's name ends in {', '.join(sorted(VIDEO_SUFFIXES))}"
# Streams that show no film: covers of sound, and pictures for a seek bar.
_PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails
# A side of a visual token in pixels, and the fewest pixels of an image: four of them.
_TOKEN_SIDE = 28
_LEAST_PIXELS = 4 * _TOKEN_SIDE**2
# How many frames show whether a video's time stamps ascend: those that a B-frame of H.264 may be moved by.
_FRAMES_CHECKED = 17
# Seconds; cameras put a key frame into less.
_STEP_BACK = 10.0
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


def encode(image: Image.Image, data: Data, size: tuple[int, int] | None = None) -> bytes:
    """Return a JPEG of the image, resized to at most `data.max_pixels` and sides divisible by 28 (one visual token).

    `size` is the width and height that it is shown with, where its pixels are not square.
    """
    width, height = size or image.size
    height, width = smart_resize(height, width, _TOKEN_SIDE, _LEAST_PIXELS, data.max_pixels)
    # fetch_image puts RGBA on white, and ignores the transparency of other modes.
    shown = image.convert("RGBA") if image.has_transparency_data else image
    described: dict[str, Any] = {"image": shown, "resized_height": height, "resized_width": width}
    buffer = io.BytesIO()
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

    Seconds are counted from the first frame. The number of frames follows from `data.fps`, is at least two and at most
    `data.max_frames`, and is even, because Qwen2-VL merges frames in pairs. The window is cut into as many equal parts,
    and each frame is the one on show at the middle of its part.

    Raises:
        BadRecordError: the video cannot be read, or the window is outside of it.
    """
    try:
        clock = _clock(path)
        if not 0 <= start < min(end or clock.length, clock.length):
            raise BadRecordError(
                f"expected a window within the {clock.length:.2f} s of {path}, "
                f"found {start:g} to {end or clock.length:g} s; correct start and end"
            )
        seconds = min(end or clock.length, clock.length) - start
        count = int(np.clip(round(seconds * data.fps / 2) * 2, 2, data.max_frames // 2 * 2))
        times = start + (np.arange(count) + 0.5) * seconds / count
        return tuple(_encoded(_frames_at(path, clock, times), data)), count / seconds
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
        with _film(path) as (_, stream):
            return float(stream.average_rate or stream.guessed_rate)
    except Exception as error:
        raise BadRecordError(
            f"expected a readable video, found {path} ({reason(error)}); repair or remove it"
        ) from None


@contextmanager
def _film(path: Path) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """Yield a file at its beginning, and its video stream."""
    # As a file by name: what is before a colon would be taken for a protocol.
    with av.open(f"file:{path}") as container:
        stream = _video_stream(container)
        stream.thread_type = "AUTO"
        yield container, stream


def _video_stream(container: InputContainer) -> av.VideoStream:
    """Return the default video stream, or another if that is a cover picture. Raise ValueError if there is none."""
    streams = [one for one in container.streams.video if not one.disposition & _PICTURES]
    if not streams:
        raise ValueError("the file has no video stream")
    moving = [one for one in streams if one.frames != 1] or streams
    best = container.streams.best("video")
    return next((one for one in moving if one is best), moving[0])


@dataclass(frozen=True)
class _Clock:
    """Hold when a video's frames are shown: the time stamp of the first and the length of all, in seconds.

    `keys` are the time stamps and sizes of the packets at which decoding may begin, where a search may end elsewhere.
    `times` are the seconds of each frame, in the order in which they are shown, where time stamps cannot be used.
    """

    start: float
    length: float
    keys: frozenset[tuple[Fraction | None, int]] = frozenset()
    times: Sequence[float] = ()


class _Packet(NamedTuple):
    """Hold when a packet is shown and decoded (None: not said) and how long it lasts, in seconds."""

    shown: Fraction | None
    decoded: Fraction | None
    lasts: Fraction
    size: int
    is_key: bool


def _clock(path: Path) -> _Clock:
    """Return the clock of a video's time stamps or, where they are missing or go back, of its packets in their order.

    MP4 and Matroska store when each frame is shown, and find it. AVI, ASF and raw streams store less, and a transport
    stream that was joined from several begins anew in the middle: of these and others, all packets are looked at.
    """
    with _film(path) as (container, stream):
        first = [frame.time for frame in islice(container.decode(stream), _FRAMES_CHECKED)]
        stored = container.format.name.startswith(("mov,", "matroska,"))
        near_end = (container.duration or 0) / av.time_base - _STEP_BACK
    if not first:
        raise ValueError("no frame could be decoded")
    usable = None not in first and _ascend(first)
    if usable and stored:
        return _Clock(first[0], _end(_last_packets(path, near_end)) - first[0])
    if not (packets := list(_packets(path))):
        raise ValueError("no packet could be read")
    decoded = [packet.decoded for packet in packets]
    shown = sorted(packet.shown for packet in packets if packet.shown is not None)
    if usable and _ascend(shown) and _ascend([seconds for seconds in decoded if seconds is not None]):
        keys = frozenset((packet.shown, packet.size) for packet in packets if packet.is_key)
        return _Clock(first[0], _end(packets) - first[0], keys)
    if None in decoded or not _ascend(decoded):
        decoded = list(accumulate((packet.lasts for packet in packets[:-1]), initial=Fraction()))
    times = [float(seconds - decoded[0]) for seconds in decoded]
    return _Clock(0.0, float(decoded[-1] - decoded[0] + packets[-1].lasts), times=times)


def _ascend(seconds: Sequence[float] | Sequence[Fraction]) -> bool:
    return all(one < other for one, other in pairwise(seconds))


def _end(packets: Iterable[_Packet]) -> float:
    """Return the time stamp, in seconds, at which the last of some packets has been shown."""
    return float(max(packet.shown + packet.lasts for packet in packets if packet.shown is not None))


def _last_packets(path: Path, place: float) -> list[_Packet]:
    """Return the packets after the last key frame before `place` s, which is near the end, or all.

    The length in a file's header cannot be used: Matroska has none for a stream, and the container's is that of the
    longest stream, which may be sound that begins earlier or ends later.
    """
    with suppress(av.FFmpegError):
        if place > 0 and (packets := list(_packets(path, place))):
            return packets
    return list(_packets(path))


def _packets(path: Path, place: float | None = None) -> Iterator[_Packet]:
    """Yield the packets of a file, from a search for `place` seconds after its stream's start on (None: all)."""
    with _film(path) as (container, stream):
        scale = stream.time_base
        if place is not None:
            container.seek((stream.start_time or 0) + int(place / scale), stream=stream)
        for one in container.demux(stream):
            if one.size and not one.is_discard:
                shown, decoded = (None if stamp is None else stamp * scale for stamp in (one.pts, one.dts))
                lasts = one.duration * scale if one.duration else 1 / (stream.guessed_rate or stream.average_rate)
                yield _Packet(shown, decoded, lasts, one.size, one.is_keyframe)


class _Frame(NamedTuple):
    """Hold a frame with its seconds after the first and how many times as wide as high its stored pixels are."""

    seconds: float
    stored: av.VideoFrame
    pixel_aspect: float


def _frames_at(path: Path, clock: _Clock, times: np.ndarray) -> Iterator[_Frame]:
    """Yield the frame on show at each of the ascending `times` (s), decoding once from the key frame before them."""
    wanted, shown = list(times), None
    for frame in _frames_from(path, clock, times[0]):
        while wanted and shown is not None and frame.seconds > wanted[0]:
            wanted.pop(0)
            yield shown
        if not wanted:
            return
        shown = frame
    if shown is None:
        raise ValueError("no frame could be decoded")
    yield from [shown] * len(wanted)


def _frames_from(path: Path, clock: _Clock, time: float) -> Iterator[_Frame]:
    """Return the frames, of which the first is shown at `time` s or before, or is the first of all.

    They are decoded from a key frame before `time`, or from the beginning: a search for one may fail, or land after it,
    as in a transport stream, which has no index.
    """
    for place in () if clock.times else (time, time - _STEP_BACK):
        frames = _decoded(path, clock, place)
        with suppress(av.FFmpegError):
            first = next(frames, None) if place > 0 else None
            if first is not None and 0 <= first.seconds <= time:
                return chain([first], frames)
    return _decoded(path, clock)


def _decoded(path: Path, clock: _Clock, place: float | None = None) -> Iterator[_Frame]:
    """Yield the frames from the key frame on that a search for `place` s finds, or all (None)."""
    with _film(path) as (container, stream):
        aspect = float(stream.sample_aspect_ratio or 1)
        packets = container.demux(stream)
        if place is not None:
            container.seek(int((clock.start + place) / stream.time_base), stream=stream)
            packets = dropwhile(lambda packet: not _begins(packet, clock), packets)
        frames = (frame for packet in packets for frame in packet.decode())
        if place is not None:
            frames = dropwhile(lambda frame: frame.is_corrupt, frames)
        for number, frame in enumerate(frames):
            seconds = clock.times[min(number, len(clock.times) - 1)] if clock.times else frame.time - clock.start
            yield _Frame(seconds, frame, aspect)


def _begins(packet: av.Packet, clock: _Clock) -> bool:
    """Return whether decoding may begin at a packet: what depends on frames before would be grey."""
    if not packet.is_keyframe or packet.pts is None:
        return False
    return not clock.keys or (packet.pts * packet.time_base, packet.size) in clock.keys


def _encoded(frames: Iterable[_Frame], data: Data) -> Iterator[bytes]:
    """Yield the JPEG of each frame, all as large as the first: one of another shape is put on black."""
    size = None
    for frame in frames:
        image, own = _as_shown(frame)
        size = size or own
        yield encode(image if own == size else ImageOps.pad(image.resize(own), size), data, size)


def _as_shown(frame: _Frame) -> tuple[Image.Image, tuple[int, int]]:
    """Return a frame as players show it, turned and mirrored, and its width and height with square pixels.

    A camera held upright stores its frames on their side, and one that faces its holder mirrored, with a display matrix
    that maps a stored pixel (x, y) to (a x + c y, b x + d y), y downwards.
    """
    stored = frame.stored
    if any(component.is_alpha for component in stored.format.components):
        image = Image.fromarray(stored.to_ndarray(format="rgba"))
    else:
        image = stored.to_image()
    width, height = max(1, round(stored.width * frame.pixel_aspect)), stored.height
    if (matrix := stored.side_data.get("DISPLAYMATRIX")) is None:
        return image, (width, height)
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    if abs(b) + abs(c) > abs(a) + abs(d):
        image, width, height, a, d = image.transpose(Image.Transpose.TRANSPOSE), height, width, c, b
    if a < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if d < 0:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return image, (width, height)
