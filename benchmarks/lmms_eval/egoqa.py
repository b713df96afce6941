"""Give lmms-eval the questions of the test split, and score its answers as `evaluate` does; see docs/other-engines.md.

lmms-eval loads this file by its path, for the functions that egoqa.yaml names.
"""

import io
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from datasets import Dataset
from PIL import Image

from firstsight.evaluation.metrics import is_right
from firstsight.records.sample import Record

_CLIPS = tempfile.TemporaryDirectory()  # lmms-eval takes a video as a file


def documents(split: Dataset) -> Dataset:
    """Return a row for each question, with the media of its sample, for a `split` with a row for each sample."""
    return split.map(_questions, batched=True, batch_size=16, remove_columns=split.column_names)


def _questions(samples: dict[str, list[Any]]) -> dict[str, list[Any]]:
    rows = [
        {**record, "sample": name, "media_kind": kind, "frames": frames, "fps": fps}
        for records, name, kind, frames, fps in zip(
            *(samples[column] for column in ("records", "id", "media_kind", "frames", "fps")), strict=True
        )
        for record in records
    ]
    return {column: [row[column] for row in rows] for column in rows[0]}


def prompt(document: dict[str, Any], _settings: dict[str, Any] | None = None) -> str:
    """Return what `evaluate` asks: the question, and any options with their letters."""
    return _record(document).prompt()


def answer(document: dict[str, Any]) -> str:
    """Return the true answer."""
    return document["answer"]


def media(document: dict[str, Any]) -> list[Image.Image | str]:
    """Return the question's images, or the path of its clip, which is written without loss."""
    frames = [Image.open(io.BytesIO(frame)).convert("RGB") for frame in document["frames"]]
    if document["media_kind"] != "video":
        return frames
    path = Path(_CLIPS.name) / f"{document['sample']}.avi"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, frames, document["fps"])
    return [str(path)]


def _write(path: Path, frames: list[Image.Image], fps: float) -> None:
    width, height = frames[0].size
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "ffv1", rate=Fraction(fps).limit_denominator(1000), width=width, height=height, pix_fmt="bgr0"
        )
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def scores(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return the exact match of an answer, 1.0 or 0.0, of which `evaluate` takes the mean."""
    return {"exact_match": is_right(_record(document), results[0].strip())}


def _record(document: dict[str, Any]) -> Record:
    values = {name: document[name] for name in Record.__dataclass_fields__}
    return Record(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
