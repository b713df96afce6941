"""Images and videos as JPEG frames: decoded, sampled and resized once, when the data set is built."""

import io
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from qwen_vl_utils import fetch_image

from firstsight.core.errors import UserError
from firstsight.core.params import Data

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"})


def encode(picture: Image.Image, data: Data) -> bytes:
    """JPEG of the picture, resized to sides divisible by 28 (one merged visual token) within `data.max_pixels`."""
    buffer = io.BytesIO()
    fetch_image({"image": picture, "max_pixels": data.max_pixels}).save(buffer, "JPEG", quality=data.jpeg_quality)
    return buffer.getvalue()


def read_image(path: Path, data: Data, place: str) -> bytes:
    """One image file as JPEG bytes. `place` names the record in the error raised when it cannot be read."""
    try:
        with Image.open(path) as picture:
            # Cameras that are held upright say so in a tag, and store the picture lying on its side.
            return encode(ImageOps.exif_transpose(picture), data)
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{place}: expected a readable image, found {path} ({error}); mend or remove it") from None


def read_video(path: Path, data: Data, start: float, end: float | None, place: str) -> tuple[tuple[bytes, ...], float]:
    """Frames of `path` between `start` and `end` seconds (None: to its end), evenly spaced, and their rate per second.

    `data.fps` frames a second, at least two and at most `data.max_frames`, an even number, because Qwen2-VL merges
    frames in pairs. Each is the last frame shown at the middle of its share of the time.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            length = _duration(container, stream)
            if not 0 <= start < min(end or length, length):
                raise UserError(
                    f"{place}: expected a window within the {length:.2f} s of {path}, "
                    f"found {start:g} to {end or length:g} s; correct start and end"
                )
            seconds = min(end or length, length) - start
            count = int(np.clip(round(seconds * data.fps / 2) * 2, 2, data.max_frames // 2 * 2))
            times = start + (np.arange(count) + 0.5) * seconds / count
            return tuple(encode(frame, data) for frame in _frames_at(container, stream, times)), count / seconds
    except (OSError, av.FFmpegError, ValueError, IndexError) as error:
        raise UserError(f"{place}: expected a readable video, found {path} ({error}); mend or remove it") from None


def _duration(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Length in seconds: as the stream says, else the container, else (a recording cut short) its packets."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if container.duration:
        return container.duration / av.time_base
    ends = [packet.pts + (packet.duration or 0) for packet in container.demux(stream) if packet.pts is not None]
    container.seek(0)
    if not ends:
        raise av.error.InvalidDataError(0, "there is no timed frame in it")
    return float((max(ends) - (stream.start_time or 0)) * stream.time_base)


def _frames_at(
    container: av.container.InputContainer, stream: av.VideoStream, times: np.ndarray
) -> Iterator[Image.Image]:
    """The frame on show at each of the ascending `times`, decoding once from the key frame before the first."""
    origin = float((stream.start_time or 0) * stream.time_base)
    container.seek(int((origin + times[0]) / stream.time_base), stream=stream)
    wanted, shown = list(times), None
    for frame in container.decode(stream):
        while wanted and shown is not None and frame.time - origin > wanted[0]:
            wanted.pop(0)
            yield shown.to_image()
        if not wanted:
            return
        shown = frame
    if shown is None:
        raise av.error.InvalidDataError(0, "no frame could be decoded")
    for _ in wanted:
        yield shown.to_image()
