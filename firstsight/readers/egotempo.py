"""Read EgoTempo: open questions on time and order, about clips of Ego4D (Plizzari et al. 2025).

`data.path` is `egotempo_openQA.json`: a list under `annotations` with `question_id`, `clip_id`, `question_type`,
`question` and `answer`. The clip `{video}_{start}_{end}` is the file `{clip_id}.mp4` in the media root or, if that is
missing, the seconds `start` to `end` of `{video}.mp4`. The group is the Ego4D video.

Source of the format: the README of google-research-datasets/egotempo. Some clips have a `start` just below 0.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from firstsight.core.params import Data
from firstsight.readers.media import Files, files, first_there
from firstsight.readers.problems import BadRecordError, Problems
from firstsight.readers.source_record import Asked, source_record
from firstsight.readers.text_files import as_object, media_root, read_records


def read(data: Data, problems: Problems) -> Iterator[Asked]:
    """Yield the questions in the order of the file.

    Raises:
        UserError: the file is missing or has no annotations.
    """
    root = media_root(data)
    for place, raw in read_records(Path(data.path), "EgoTempo's annotations", "annotations"):
        with problems.at(place):
            record = as_object(raw)
            video, start, end = _parts(record.get("clip_id"))
            asked = source_record(
                place,
                id=record.get("question_id"),
                question=record.get("question"),
                answer=record.get("answer"),
                question_type=record.get("question_type"),
                group=video,
            )
            yield Asked(asked, _media(root, record["clip_id"], video, start, end))


def _parts(clip: object) -> tuple[str, float, float]:
    """Return the video of a clip's name, and the start and end in seconds."""
    found = re.fullmatch(r"(.+)_(-?\d+(?:\.\d+)?)_(\d+(?:\.\d+)?)", clip) if isinstance(clip, str) else None
    if not found or float(found[2]) >= float(found[3]):
        raise BadRecordError(f"expected a clip_id {{video}}_{{start}}_{{end}}, found {str(clip)[:80]!r}; correct it")
    return found[1], max(float(found[2]), 0.0), float(found[3])


def _media(root: Path, clip: str, video: str, start: float, end: float) -> Files:
    if first_there(root, names := [f"{clip}.mp4", f"{video}.mp4"]) == names[1]:
        return files(root, names[1], start, end)
    return files(root, names[0])
