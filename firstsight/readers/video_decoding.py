"""Decode videos, and sample their frames."""

import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain, dropwhile
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image, ImageOps

from firstsight.core.params import Data
from firstsight.readers.image_decoding import encode
from firstsight.readers.problems import BadRecordError, reason
from firstsight.readers.video_clock import STEP_BACK, Clock, film, read_clock


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
        clock = read_clock(path)
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
        with film(path) as (_, stream):
            return float(stream.average_rate or stream.guessed_rate)
    except Exception as error:
        raise BadRecordError(
            f"expected a readable video, found {path} ({reason(error)}); repair or remove it"
        ) from None


class _Frame(NamedTuple):
    """Hold a frame with its seconds after the first, how many times as wide as high its stored pixels are, and how it
    is turned (None: not), see `_as_shown`.
    """

    seconds: float
    stored: av.VideoFrame
    pixel_aspect: float
    matrix: bytes | None


def _frames_at(path: Path, clock: Clock, times: np.ndarray) -> Iterator[_Frame]:
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


def _frames_from(path: Path, clock: Clock, time: float) -> Iterator[_Frame]:
    """Return the frames, of which the first is shown at `time` s or before, or is the first of all.

    They are decoded from a key frame before `time`, or from the beginning: a search for one may fail, or land after it,
    as in a transport stream, which has no index.
    """
    for place in () if clock.times else (time, time - STEP_BACK):
        frames = _decoded(path, clock, place)
        with suppress(av.FFmpegError):
            first = next(frames, None) if place > 0 else None
            if first is not None and 0 <= first.seconds <= time:
                return chain([first], frames)
    return _decoded(path, clock)


def _decoded(path: Path, clock: Clock, place: float | None = None) -> Iterator[_Frame]:
    """Yield the frames from the key frame on that a search for `place` s finds, or all (None)."""
    with film(path) as (container, stream):
        # What the container says of the pixels' shape is true for all frames, what the stream says until it changes.
        said = stream.sample_aspect_ratio
        contained = said != stream.codec_context.sample_aspect_ratio
        matrix = None
        packets = container.demux(stream)
        if place is not None:
            container.seek(int((clock.start + place) / stream.time_base), stream=stream)
            packets = dropwhile(lambda packet: not _begins(packet, clock), packets)
        frames = (frame for packet in packets for frame in packet.decode())
        if place is not None:
            frames = dropwhile(lambda frame: frame.is_corrupt, frames)
        for number, frame in enumerate(frames):
            seconds = clock.times[min(number, len(clock.times) - 1)] if clock.times else frame.time - clock.start
            turned = frame.side_data.get("DISPLAYMATRIX")
            # In the stream, it is stored beside key frames alone.
            if turned is not None or frame.key_frame:
                matrix = turned and bytes(turned)
            aspect = said if contained else stream.codec_context.sample_aspect_ratio
            yield _Frame(seconds, frame, float(aspect or 1), matrix)


def _begins(packet: av.Packet, clock: Clock) -> bool:
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
    if frame.matrix is None:
        return image, (width, height)
    a, b, _, c, d, *_ = struct.unpack("=9i", frame.matrix)
    if abs(b) + abs(c) > abs(a) + abs(d):
        image, width, height, a, d = image.transpose(Image.Transpose.TRANSPOSE), height, width, c, b
    if a < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if d < 0:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return image, (width, height)
