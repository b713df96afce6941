"""report.html: the table, the pictures, test questions with every variant's answer; one file that needs no network."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from PIL import Image

from firstsight.data.records import Record, Sample
from firstsight.evaluation.metrics import score
from firstsight.reporting.contact_sheet import strip
from firstsight.reporting.summary import VARIANTS
from firstsight.reporting.table import HEADER, rows, size

_GALLERY = 24


def write(
    path: Path,
    *,
    quality: dict,
    performance: dict,
    environment: dict[str, Any],
    card: dict,
    samples: Sequence[Sample],
    parameters: str,
    pictures: dict[str, Path],
    questions: Sequence[tuple[Sample, Record]],
    predictions: dict[str, list[str]],
) -> None:
    """Fill firstsight/reporting/report.html.jinja and write it to `path`.

    `samples` show what is learnt from; `pictures` are PNG files by caption; `predictions` the variants' answers in the
    order of `questions`.
    """
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["jinja"]))
    templates.filters["format_count"] = lambda count: size(count, "")
    page = templates.get_template("report.html.jinja").render(
        header=HEADER,
        rows=rows(quality, performance),
        quality=quality,
        performance=performance,
        environment=environment,
        card=card,
        parameters=parameters,
        variants=VARIANTS,
        pictures={caption: _data_uri(file.read_bytes(), "png") for caption, file in pictures.items()},
        samples=[{"picture": _jpeg(strip(sample)) if sample.frames else None, "sample": sample} for sample in samples],
        gallery=_gallery(questions, predictions),
    )
    path.write_text(page, encoding="utf-8")


def _gallery(questions: Sequence[tuple[Sample, Record]], predictions: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Questions spread evenly over the test split, each with its first frame and what every variant answered."""
    step = max(1, len(questions) // _GALLERY)
    return [
        {
            "picture": _thumbnail(sample),
            "question": record.prompt(),
            "answer": " / ".join(record.answers),
            "given": [
                (variant, predictions[variant][number], score(record, predictions[variant][number]).exact_match == 1)
                for variant in VARIANTS
            ],
        }
        for number, (sample, record) in list(enumerate(questions))[::step][:_GALLERY]
    ]


def _thumbnail(sample: Sample) -> str | None:
    """The middle frame, at most 240 pixels wide, as a data URI; None without media."""
    if not sample.frames:
        return None
    picture = sample.pictures()[len(sample.frames) // 2]
    picture.thumbnail((240, 240))
    return _jpeg(picture)


def _jpeg(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return _data_uri(buffer.getvalue(), "jpeg")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
