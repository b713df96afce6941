"""Decode the images and videos of a data set in parallel, in chunks that survive an interrupted build.

A chunk is a parquet file, named by a hash of what it is made from. A rerun decodes only the chunks that are missing,
damaged, or contain a file that could not be decoded, since it may have been repaired.
"""

import hashlib
import io
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from firstsight.assembly.assemble import Unit
from firstsight.core.cores import cores
from firstsight.core.errors import UserError
from firstsight.core.faults import writing
from firstsight.core.files import fingerprint
from firstsight.core.launchers import end_with
from firstsight.core.params import Data
from firstsight.core.progress import progress
from firstsight.core.stage import log
from firstsight.readers.problems import BadRecordError, Problems
from firstsight.readers.source_record import DecodedMedia, Media

CHUNK = 16
# Up to this many units are decoded in this process: starting workers takes longer.
_ALONE = 256
# A look is a thumbnail for comparisons: the first, middle and last frame, each reduced to this many pixels a side.
LOOK = 12
_SCHEMA = pa.schema(
    [
        ("frames", pa.list_(pa.binary())),
        ("fps", pa.float64()),
        ("digest", pa.binary()),
        ("look", pa.binary()),
        ("size", pa.list_(pa.int32())),
        ("problem", pa.string()),
    ]
)


@dataclass(frozen=True)
class Decoded:
    """Hold what is kept in memory of a unit's decoded frames, which stay on disk.

    `digest` is the SHA-256 of the frames' hashes; `look` is uint8 [3, LOOK, LOOK, 3], to compare media by; `size` is
    (frames, width, height, bytes). For a unit without media, `digest` is empty and the others are zero.
    """

    digest: bytes
    look: np.ndarray
    size: tuple[int, int, int, int]


class Decoder:
    """Decode units into chunks in a folder, and read them back.

    Args:
        folder: persists from one run to the next, see `firstsight.core.scratch.kept_folder`.
    """

    def __init__(self, folder: Path, units: Sequence[Unit], data: Data):
        self._data = data
        self._chunks = [units[start : start + CHUNK] for start in range(0, len(units), CHUNK)]
        settings = data.model_dump(include={"fps", "max_frames", "max_pixels", "jpeg_quality"})
        self._paths = [
            folder / f"{fingerprint([settings, [(unit.key, _stamp(unit.media)) for unit in chunk]])}.parquet"
            for chunk in self._chunks
        ]

    def run(self, problems: Problems) -> list[tuple[Unit, Decoded]]:
        """Decode the chunks that are missing, and return the units whose media could be decoded.

        Raises:
            UserError: media cannot be decoded and the policy of `problems` is `stop`, or a worker was killed.
        """
        kept = []
        total = sum(map(len, self._chunks))
        with progress(desc="build-egoqa-dataset: media", unit="media", total=total) as shown:
            for chunk, path in zip(self._chunks, self._written(), strict=True):
                table = pq.read_table(path, columns=["digest", "look", "size", "problem"]).to_pylist()
                for unit, row in zip(chunk, table, strict=True):
                    if row["problem"]:
                        for question in unit.questions:
                            problems.report(question.place, row["problem"])
                    else:
                        look = np.frombuffer(row["look"], np.uint8).reshape(3, LOOK, LOOK, 3)
                        kept.append((unit, Decoded(row["digest"], look, tuple(row["size"]))))
                shown.update(len(chunk))
        return kept

    def media(self) -> Iterator[tuple[str, DecodedMedia]]:
        """Yield key and frames of each unit whose media could be decoded, in order, with one chunk in memory."""
        for chunk, path in zip(self._chunks, self._paths, strict=True):
            rows = pq.read_table(path, columns=["frames", "fps"]).to_pylist()
            for unit, row in zip(chunk, rows, strict=True):
                if row["frames"] is not None:
                    yield unit.key, DecodedMedia(tuple(row["frames"]), row["fps"])

    def _written(self) -> Iterator[Path]:
        """Write the chunks that are missing, in parallel if there are many, and yield every chunk's path, in order.

        Raises:
            UserError: a worker was killed.
        """
        missing = [number for number, path in enumerate(self._paths) if not _whole(path)]
        workers = cores()
        if workers == 1 or len(missing) * CHUNK <= _ALONE:
            missing = set(missing)
            for number, path in enumerate(self._paths):
                if number in missing:
                    _write(path, [unit.media for unit in self._chunks[number]], self._data)
                yield path
            return
        # Workers are forked from a server that has imported what they need, but has none of this process's threads.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "firstsight.assembly.sources"])
        with ProcessPoolExecutor(workers, context, end_with, (os.getpid(),)) as pool:
            try:
                yield from self._in_order(pool, deque(missing), 2 * workers)
            except BrokenProcessPool:
                raise UserError(
                    "build-egoqa-dataset: expected the decoding workers to live, found one killed (out of memory?); "
                    "run it again: what has been decoded is kept"
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)

    def _in_order(self, pool: ProcessPoolExecutor, missing: deque[int], ahead: int) -> Iterator[Path]:
        """Yield the path of each chunk once it is written, with at most `ahead` chunks submitted to the pool."""
        waiting: dict[int, Future] = {}
        for number, path in enumerate(self._paths):
            while missing and len(waiting) < ahead:
                one = missing.popleft()
                media = [unit.media for unit in self._chunks[one]]
                waiting[one] = pool.submit(_write, self._paths[one], media, self._data)
            if number in waiting:
                waiting.pop(number).result()
            yield path


def _whole(path: Path) -> bool:
    """Return whether a chunk is there, undamaged, and without files that could not be decoded."""
    if not path.exists():
        return False
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        log.warning("%s is damaged (%s); decoding it again", path, error)
        return False
    return not any(table.column("problem").to_pylist())


def _write(path: Path, media: list[Media | None], data: Data) -> None:
    """Decode a chunk and write it atomically."""
    table = pa.Table.from_pylist([_decode(one, data) for one in media], _SCHEMA)
    partial = path.with_suffix(".partial")
    with writing(partial):
        pq.write_table(table, partial, compression="none", write_page_checksum=True)
    partial.rename(path)


def _decode(media: Media | None, data: Data) -> dict:
    """Return the row of a chunk's table for `media`; only `problem` is set if it cannot be decoded."""
    if media is None:
        return {"frames": [], "fps": 0.0, "digest": b"", "look": bytes(9 * LOOK**2), "size": [0] * 4, "problem": None}
    try:
        decoded = media.load(data)
    except BadRecordError as error:
        return {"problem": str(error)}
    frames = decoded.frames
    shown = [Image.open(io.BytesIO(frames[place])) for place in (0, len(frames) // 2, -1)]
    return {
        "frames": list(frames),
        "fps": decoded.fps,
        "digest": hashlib.sha256(b"".join(hashlib.sha256(frame).digest() for frame in frames)).digest(),
        "look": b"".join(one.resize((LOOK, LOOK), Image.Resampling.BOX).tobytes() for one in shown),
        "size": [len(frames), *shown[0].size, sum(map(len, frames))],
        "problem": None,
    }


def _stamp(media: Media | None) -> object:
    """Return a JSON value that changes when the media changes under the same key."""
    return media.stamp() if media else None
