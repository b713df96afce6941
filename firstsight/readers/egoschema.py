"""Read EgoSchema: five-way questions about three-minute videos cut from Ego4D (Mangalam et al. 2023).

`data.path` is its `questions.json` (`q_uid`, `question`, `option 0` to `option 4`). Two more files are read if they are
in the same folder: `subset_answers.json` has the 500 public answers, and then only its questions are read;
`uid_to_ego4d.json` has the Ego4D video of each question, which becomes its group. Alternatively, the path is a parquet
file of lmms-eval's copy on the hub (`video_idx`, `question`, `option`, `answer`; its Subset has the answers). Videos
are `{q_uid}.mp4` in the media root or in `videos/` below it.

Source of the formats: the files of egoschema/EgoSchema, and lmms_eval/tasks/egoschema for the hub's copy.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from firstsight.core.errors import UserError
from firstsight.core.params import Data
from firstsight.readers.choices import chosen, plain_options
from firstsight.readers.media import files, first_there
from firstsight.readers.problems import BadRecordError, Problems
from firstsight.readers.source_record import Asked, source_record
from firstsight.readers.text_files import as_object, media_root, read_json, read_records


def read(data: Data, problems: Problems) -> Iterator[Asked]:
    """Yield the questions in the order of the file; all are unanswered if there is no file of answers.

    Raises:
        UserError: the file, or one of the two in its folder, has another content.
    """
    path, root = Path(data.path), media_root(data)
    answers, videos = (_beside(path, name) for name in ("subset_answers.json", "uid_to_ego4d.json"))
    for place, raw in read_records(path, "EgoSchema's questions"):
        with problems.at(place):
            record = as_object(raw)
            uid = record.get("q_uid", record.get("video_idx"))
            if not isinstance(uid, str):
                raise BadRecordError(f"q_uid: expected text, found {repr(uid)[:60]}; correct it")
            if answers and "answer" not in record and uid not in answers:
                problems.left_out["question without a public answer"] += 1
                continue
            yield _asked(place, uid, {"answer": answers.get(uid)} | record, videos.get(uid), root)


def _beside(path: Path, name: str) -> Mapping[str, Any]:
    """Return the JSON object in the file `name` in the folder of `path`; empty if there is no such file."""
    if not (file := path.with_name(name)).exists():
        return {}
    found = read_json(file, f"EgoSchema's {name}")
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected a JSON object by q_uid, found {str(found)[:60]}; correct it")
    return found


def _asked(place: str, uid: str, record: dict[str, Any], video: Any, root: Path) -> Asked:
    options = record.get("option") or [record[f"option {n}"] for n in range(5) if f"option {n}" in record]
    if not isinstance(options, list) or len(options) != 5:
        raise BadRecordError(f"expected five options, found {str(options)[:60]!r}; correct them")
    media = files(root, first_there(root, [f"{uid}.mp4", f"videos/{uid}.mp4"]))
    return Asked(
        source_record(
            place,
            id=uid,
            question=record.get("question"),
            options=plain_options(options),
            answer=chosen(record["answer"], options),
            question_type="egoschema",
            group=video.get("video_uid") if isinstance(video, dict) else None,
        ),
        media,
    )
