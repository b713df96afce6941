"""Say when each frame of a video is shown, whatever its container stores."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import NamedTuple

import av
from av.container import InputContainer
from av.stream import Disposition

# Streams that show no film: covers of sound, and pictures for a seek bar.
_PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails
# How many frames show whether a video's time stamps ascend: those that a B-frame of H.264 may be moved by.
_FRAMES_CHECKED = 17
# How many packets show which of several streams are films: some seconds of them.
_PACKETS_CHECKED = 100
# Seconds; cameras put a key frame into less.
STEP_BACK = 10.0


@contextmanager
def film(path: Path) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """Yield a file at its beginning, and its default video stream, or another if that is a cover picture.

    Raises:
        ValueError: there is none.
    """
    with _opened(path) as container:
        streams = [one for one in container.streams.video if not one.disposition & _PICTURES]
        if not streams:
            raise ValueError("the file has no video stream")
        number = streams[0].index if len(streams) == 1 else _default(path, {one.index for one in streams})
        stream = next(one for one in streams if one.index == number)
        stream.thread_type = "AUTO"
        yield container, stream


def _opened(path: Path) -> InputContainer:
    # As a file by name: what is before a colon would be taken for a protocol.
    return av.open(f"file:{path}")


def _default(path: Path, numbers: set[int]) -> int:
    """Return the number of the default one of several video streams that are no cover picture of a single packet."""
    with _opened(path) as container:
        streams = [one for one in container.streams.video if one.index in numbers]
        packets = Counter(one.stream_index for one in islice(container.demux(streams), _PACKETS_CHECKED) if one.size)
        moving = [one for one in streams if packets[one.index] > 1] or streams
        best = container.streams.best("video")
        return next((one for one in moving if one is best), moving[0]).index


@dataclass(frozen=True)
class Clock:
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


def read_clock(path: Path) -> Clock:
    """Return the clock of a video's time stamps or, where they are missing or go back, of its packets in their order.

    MP4 and Matroska store when each frame is shown, and find it. AVI, ASF and raw streams store less, and a transport
    stream that was joined from several begins anew in the middle: of these and others, all packets are looked at.
    """
    with film(path) as (container, stream):
        first = [frame.time for frame in islice(container.decode(stream), _FRAMES_CHECKED)]
        stored = container.format.name.startswith(("mov,", "matroska,"))
        near_end = (container.duration or 0) / av.time_base - STEP_BACK
    if not first:
        raise ValueError("no frame could be decoded")
    usable = None not in first and _ascend(first)
    if usable and stored:
        return Clock(first[0], _end(_last_packets(path, near_end)) - first[0])
    if not (packets := list(_packets(path))):
        raise ValueError("no packet could be read")
    decoded = [packet.decoded for packet in packets]
    shown = sorted(packet.shown for packet in packets if packet.shown is not None)
    if usable and _ascend(shown) and _ascend([seconds for seconds in decoded if seconds is not None]):
        keys = frozenset((packet.shown, packet.size) for packet in packets if packet.is_key)
        return Clock(first[0], _end(packets) - first[0], keys)
    if None in decoded or not _ascend(decoded):
        decoded = list(accumulate((packet.lasts for packet in packets[:-1]), initial=Fraction()))
    times = [float(seconds - decoded[0]) for seconds in decoded]
    return Clock(0.0, float(decoded[-1] - decoded[0] + packets[-1].lasts), times=times)


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
    with film(path) as (container, stream):
        scale = stream.time_base
        if place is not None:
            container.seek((stream.start_time or 0) + int(place / scale), stream=stream)
        for one in container.demux(stream):
            if one.size and not one.is_discard:
                shown, decoded = (None if stamp is None else stamp * scale for stamp in (one.pts, one.dts))
                lasts = one.duration * scale if one.duration else 1 / (stream.guessed_rate or stream.average_rate)
                yield _Packet(shown, decoded, lasts, one.size, one.is_keyframe)
