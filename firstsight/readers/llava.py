"""Read conversations in LLaVA's format, as in EgoIT-99K (Yang et al. 2025): a JSON list, JSON Lines or parquet.

    {"id": "7", "video": "Ego4d/0a1b.mp4", "audio": "Ego4d_audio/0a1b.mp3", "conversations": [
      {"from": "human", "value": "<image>\\n<speech>\\nWhat do I hold?"}, {"from": "gpt", "value": "A cup."}]}

`image` is a path or a list of paths, `video` a path. Each human turn, with the answer after it, is one question about
the image or video; options in its text stay part of the text. `start_frame` and `end_frame` are a window, counted in
the video's own frames, and a later `current_observation_frame` extends it, as in EgoGPT's training code, which ignores
`start_time`, `end_time` and `fps`. Audio is not read; the data card counts the records that have some.

Source of the format: the data set card of lmms-lab/EgoIT-99K, and EgoGPT/egogpt/train/train_audio.py of
EvolvingLMMs-Lab/EgoLife.
"""

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from firstsight.core.params import Data
from firstsight.readers.media import Files, files, frame_rate
from firstsight.readers.overlap import video_ids
from firstsight.readers.problems import BadRecordError, Problems
from firstsight.readers.source_record import PLACEHOLDER, Asked, source_record
from firstsight.readers.text_files import as_object, media_root, read_records

_PLACEHOLDER = re.compile(rf"\s*{PLACEHOLDER}\s*")
# A larger frame number is an error, and may not fit a float.
_MOST_FRAMES = 10**9


def read(data: Data, problems: Problems) -> Iterator[Asked]:
    """Yield the questions in the order of the records; a problem with one turn leaves out the whole record.

    Raises:
        UserError: the file is missing or has no records.
    """
    path, root, rate = Path(data.path), media_root(data), functools.cache(frame_rate)
    ids = set()
    for place, raw in read_records(path, "LLaVA's conversations"):
        with problems.at(place):
            record = {key: value for key, value in as_object(raw).items() if value is not None}
            media = _media(record, root, rate)
            name = str(record.get("id", f"{path.stem}-{place.rsplit(' ', 1)[1]}"))
            # EgoIT-99K joins nine data sets whose ids repeat.
            name = f"{name}-record-{place.rsplit(' ', 1)[1]}" if name in ids else name
            ids.add(name)
            asked = _questions(place, name, record, media)
            if "audio" in record:
                problems.left_out["audio track"] += 1
            yield from asked


def _questions(place: str, name: str, record: dict[str, Any], media: Files | None) -> list[Asked]:
    turns = record.get("conversations")
    turns = turns if isinstance(turns, list) else []
    speakers = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    if not turns or speakers != ["human", "gpt"] * (len(turns) // 2):
        raise BadRecordError(
            f"expected conversations of human and gpt in turn, found {str(speakers)[:60]}; correct them"
        )
    # The names of a video's clips contain the video's id.
    videos = video_ids(media.titles()) if media else set()
    group = videos.pop() if len(videos) == 1 else None
    texts = [turn.get("value") for turn in turns]
    texts[::2] = [_PLACEHOLDER.sub("\n", text).strip() if isinstance(text, str) else text for text in texts[::2]]
    return [
        Asked(
            source_record(place, id=f"{name}-{turn}" if turn else name, question=asked, answer=answer, group=group),
            media,
        )
        for turn, (asked, answer) in enumerate(zip(texts[::2], texts[1::2], strict=True))
    ]


def _media(record: dict[str, Any], root: Path, rate: Callable[[Path], float]) -> Files | None:
    given = [key for key in ("image", "video") if key in record]
    if len(given) != 1:
        if not given and "audio" not in record:
            return None
        raise BadRecordError(f"expected an image or a video, found {' and '.join(given) or 'audio alone'}; correct it")
    name = record[given[0]]
    names = name if isinstance(name, list) else [name]
    if not all(isinstance(one, str) for one in names):
        raise BadRecordError(f"{given[0]}: expected a path or a list of paths, found {str(name)[:60]!r}; correct it")
    media = files(root, names[0] if len(names) == 1 else names)
    if media.kind != "video" or "start_frame" not in record:
        return media
    first: Any = record["start_frame"]
    last: Any = record.get("end_frame")
    shown = record.get("current_observation_frame", last)
    numbers = all(isinstance(frame, int) and frame < _MOST_FRAMES for frame in (first, last, shown))
    if not numbers or not 0 <= first < last:
        found = " and ".join(repr(frame)[:40] for frame in (first, last))
        raise BadRecordError(f"expected start_frame before end_frame, found {found}; correct them")
    frames_a_second = rate(root / media.names[0])
    return replace(media, start=first / frames_a_second, end=max(last, shown) / frames_a_second)
