"""Write report.html: tables, figures, test questions with all variants' answers, in one file that needs no network."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from firstsight.core.variants import TEACHER
from firstsight.evaluation.metrics import is_right
from firstsight.records.sample import Record, Sample
from firstsight.reporting.comparison import first_header, first_rows, header, rows
from firstsight.reporting.contact_sheet import strip
from firstsight.reporting.criteria import Verdict, conclusions, meanings
from firstsight.reporting.measure import TEXTS, measure_of
from firstsight.reporting.summary import before_and_after

# Most test questions shown: the page, with their images, is in git.
_GALLERY = 72


@dataclass(frozen=True)
class Shown:
    """Hold the content of the page; `quality`, `performance`, `models` and `quantization` are as in metrics/.

    `opening` says what was compared and what distilling added; `unjudged` which criteria are not judged, and why.
    `environments` says where each variant was measured; `samples` are training samples; `pictures` are PNG files by
    caption, the first for the opening; `predictions` are the variants' answers in the order of `questions`.
    """

    quality: dict
    performance: dict
    models: dict
    quantization: dict
    opening: Sequence[str]
    verdicts: Sequence[Verdict]
    unjudged: Sequence[str]
    environments: dict[str, dict[str, str]]
    card: dict
    samples: Sequence[Sample]
    parameters: str
    pictures: dict[str, Path]
    questions: Sequence[tuple[Sample, Record]]
    predictions: dict[str, list[str]]


def write(path: Path, shown: Shown) -> None:
    """Fill firstsight/reporting/report.html.jinja and write it to `path`."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["jinja"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    reference, trained = before_and_after(shown.quality)
    page = templates.get_template("report.html.jinja").render(
        shown=shown,
        texts=measure_of(shown.quality) is TEXTS,
        reference=reference,
        trained=trained,
        # With which a student's answers are compared; without a teacher, those of the student before its training.
        other=TEACHER if TEACHER in shown.quality else reference,
        first_header=first_header(shown.quality),
        first_rows=first_rows(shown.quality, shown.performance),
        header=header(shown.quality),
        rows=rows(shown.quality, shown.performance),
        meanings=meanings(shown.quality),
        conclusions=conclusions(shown.verdicts),
        places=sorted({", ".join((one["device"], one["engine"])) for one in shown.environments.values()}),
        figures={
            name: list(_figures(name, table))
            for name, table in (("quality", shown.quality), ("performance", shown.performance))
        },
        pictures=[
            {"caption": caption, "source": _data_uri(file.read_bytes(), "png")}
            for caption, file in shown.pictures.items()
        ],
        samples=[{"picture": _thumbnail(sample, 620), "sample": sample} for sample in shown.samples],
        gallery=_gallery(shown.questions, shown.predictions),
    )
    path.write_text(page, encoding="utf-8")


def _figures(table: str, values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, value) of every number in a metrics file, keys joined by dots."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _figures(f"{table}.{key}", value)
        else:
            yield f"{table}.{key}", f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _gallery(questions: Sequence[tuple[Sample, Record]], predictions: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Choose test questions of every question type and every combination of right variants, with all answers."""
    right = [
        [variant for variant, given in predictions.items() if is_right(record, given[number])]
        for number, (_, record) in enumerate(questions)
    ]
    groups: dict[tuple, list[int]] = {}
    for number, (_, record) in enumerate(questions):
        groups.setdefault((record.question_type, *right[number]), []).append(number)
    # Each round takes one question of each group, so that rare combinations are shown too.
    ordered = sorted((place, group[place]) for group in groups.values() for place in range(len(group)))
    chosen = sorted(number for _, number in ordered[:_GALLERY])
    return [
        {
            "picture": _thumbnail(sample, 400),
            "type": record.question_type,
            "question": record.prompt(),
            "answer": " / ".join(record.answers),
            "right": right[number],
            "given": {variant: given[number] for variant, given in predictions.items()},
        }
        for number, (sample, record) in ((number, questions[number]) for number in chosen)
    ]


def _thumbnail(sample: Sample, pixels: int) -> str | None:
    """Return all frames as one image of at most `pixels` in width and height, as a data URI; None without frames.

    Frames are not enlarged, because the browser does that and the page is in git.
    """
    if not sample.frames:
        return None
    picture, buffer = strip(sample, enlarge=False), io.BytesIO()
    picture.thumbnail((pixels, pixels))
    picture.save(buffer, "WEBP", quality=80)
    return _data_uri(buffer.getvalue(), "webp")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
