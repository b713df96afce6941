"""Decode the media of a data set: in parallel, a chunk of them at a time, each chunk kept until the data set is whole.

A chunk is a parquet file in a folder that outlives an interrupted build, named by what it is made from; a rerun decodes
only the chunks that are not there, or in which something could not be decoded: it may have been mended.
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
from tqdm import tqdm

from firstsight.core.cores import cores
from firstsight.core.errors import UserError
from firstsight.core.faults import writing
from firstsight.core.files import fingerprint
from firstsight.core.launchers import end_with
from firstsight.core.params import Data
from firstsight.core.stage import log
from firstsight.sources.assembly import Unit
from firstsight.sources.problems import BadRecordError, Problems
from firstsight.sources.question import Media, Pictures

CHUNK = 16
# Starting workers takes longer than decoding so few.
_ALONE = 256
# A look is the first, middle and last frame, each reduced to this many pixels a side.
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
    """What is known of a unit's media without holding its frames.

    `digest` is of the frames' bytes; `look` is uint8 [3, LOOK, LOOK, 3], for comparing media; `size` is (frames, width,
    height, bytes). All are zero for no media.
    """

    digest: bytes
    look: np.ndarray
    size: tuple[int, int, int, int]


class Decoder:
    """Decodes units into `folder`, and reads them back.

    Args:
        folder: kept from one run to the next, `runs.scratch.kept_folder`.
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
        """Decode what is not there yet; the units whose media could be decoded.

        Raises:
            UserError: media that cannot be decoded, where the policy is to stop; a worker that was killed.
        """
        kept = []
        total = sum(map(len, self._chunks))
        with tqdm(total=total, desc="build-egoqa-dataset: media", unit=" media") as progress:
            for chunk, path in zip(self._chunks, self._written(), strict=True):
                table = pq.read_table(path, columns=["digest", "look", "size", "problem"]).to_pylist()
                for unit, row in zip(chunk, table, strict=True):
                    if row["problem"]:
                        for question in unit.questions:
                            problems.meet(question.place, row["problem"])
                    else:
                        look = np.frombuffer(row["look"], np.uint8).reshape(3, LOOK, LOOK, 3)
                        kept.append((unit, Decoded(row["digest"], look, tuple(row["size"]))))
                progress.update(len(chunk))
        return kept

    def pictures(self) -> Iterator[tuple[str, Pictures]]:
        """Key and pictures of every unit whose media could be decoded, in order, a chunk in memory at a time."""
        for chunk, path in zip(self._chunks, self._paths, strict=True):
            rows = pq.read_table(path, columns=["frames", "fps"]).to_pylist()
            for unit, row in zip(chunk, rows, strict=True):
                if row["frames"] is not None:
                    yield unit.key, Pictures(tuple(row["frames"]), row["fps"])

    def _written(self) -> Iterator[Path]:
        """The chunks' files, in order, each when it is there."""
        missing = [number for number, path in enumerate(self._paths) if not _whole(path)]
        workers = cores()
        if workers == 1 or len(missing) * CHUNK <= _ALONE:
            missing = set(missing)
            for number, path in enumerate(self._paths):
                if number in missing:
                    _write(path, [unit.media for unit in self._chunks[number]], self._data)
                yield path
            return
        # Forked from a process that has imported what they need, which they share, but has none of this one's threads.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "firstsight.sources.readers"])
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
    """Whether the chunk is there, undamaged, and all of it could be decoded."""
    if not path.exists():
        return False
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        log.warning("%s is damaged (%s); decoded again", path, error)
        return False
    return not any(table.column("problem").to_pylist())


def _write(path: Path, media: list[Media | None], data: Data) -> None:
    """Decode a chunk and write it, whole or not at all."""
    table = pa.Table.from_pylist([_decode(one, data) for one in media], _SCHEMA)
    partial = path.with_suffix(".partial")
    with writing(partial):
        pq.write_table(table, partial, compression="none", write_page_checksum=True)
    partial.rename(path)


def _decode(media: Media | None, data: Data) -> dict:
    if media is None:
        return {"frames": [], "fps": 0.0, "digest": b"", "look": bytes(9 * LOOK**2), "size": [0] * 4, "problem": None}
    try:
        pictures = media.load(data)
    except BadRecordError as error:
        return {"problem": str(error)}
    frames = pictures.frames
    shown = [Image.open(io.BytesIO(frames[place])) for place in (0, len(frames) // 2, -1)]
    return {
        "frames": list(frames),
        "fps": pictures.fps,
        "digest": hashlib.sha256(b"".join(hashlib.sha256(frame).digest() for frame in frames)).digest(),
        "look": b"".join(one.resize((LOOK, LOOK), Image.Resampling.BOX).tobytes() for one in shown),
        "size": [len(frames), *shown[0].size, sum(map(len, frames))],
        "problem": None,
    }


def _stamp(media: Media | None) -> object:
    """What tells that media have changed under their name."""
    return media.stamp() if media else None
