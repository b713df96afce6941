"""Read conversations in LLaVA's format, as in EgoIT-99K (Yang et al. 2025): a JSON list, JSON Lines or parquet.

    {"id": "7", "video": "Ego4d/0a1b.mp4", "audio": "Ego4d_audio/0a1b.mp3", "conversations": [
      {"from": "human", "value": "<image>\\n<speech>\\nWhat do I hold?"}, {"from": "gpt", "value": "A cup."}]}

`image` is a path or a list of paths, `video` a path or the list of its frames; `images` and `videos` are the same under
the names of newer tools. Each human turn, with the answer after it, is one question about the image or video; options
in its text stay part of the text. The turns have as many `<image>` or `<video>` as there are media, or none; of several
images, a turn is asked about those shown up to it. `start_frame` and `end_frame` are a window, counted in
the video's own frames, and a later `current_observation_frame` extends it, as in EgoGPT's training code, which ignores
`start_time`, `end_time` and `fps`. Audio is not read; the data card counts the records that have some.

Source of the format: the data set card of lmms-lab/EgoIT-99K, and EgoGPT/egogpt/train/train_audio.py of
EvolvingLMMs-Lab/EgoLife.
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from firstsight.core.params import Data
from firstsight.readers.media import Files, files
from firstsight.readers.overlap import video_ids
from firstsight.readers.problems import BadRecordError, Problems
from firstsight.readers.source_record import MEDIA_PLACEHOLDER, PLACEHOLDER, Asked, source_record
from firstsight.readers.suffixes import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from firstsight.readers.text_files import as_object, media_root, read_records
from firstsight.readers.video_decoding import frame_rate

MEDIA_KEYS = ("image", "images", "video", "videos")
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
    shown = _shown(texts[::2], record, media)
    texts[::2] = [_PLACEHOLDER.sub("\n", text).strip() if isinstance(text, str) else text for text in texts[::2]]
    return [
        Asked(
            source_record(place, id=f"{name}-{turn}" if turn else name, question=asked, answer=answer, group=group),
            about,
        )
        for turn, (asked, answer, about) in enumerate(zip(texts[::2], texts[1::2], shown, strict=True))
    ]


def _shown(texts: Sequence[Any], record: dict[str, Any], media: Files | None) -> list[Files | None]:
    """Return the media that each human turn is asked about.

    Raises:
        BadRecordError: the placeholders of all turns, or of each turn that has some, are not as many as the media.
    """
    keys = _given(record)
    images = len(media.names) if media and keys[0].startswith("image") else 0
    count = images or int(media is not None)
    found = [re.findall(MEDIA_PLACEHOLDER, text) if isinstance(text, str) else [] for text in texts]
    # One <video> may stand for several images, its frames.
    counts = [count if count and places == ["<video>"] else len(places) for places in found]
    if sum(counts) != count and not set(counts) <= {0, count}:
        raise BadRecordError(
            f"expected an image or video for each <image> and <video> of the text, found {sum(counts)} of these and "
            f"{count} media under {' and '.join(keys) or ', '.join(MEDIA_KEYS)}; correct one of them"
        )
    if images < 2 or sum(counts) != count:
        return [media] * len(counts)
    return [_first(media, number) for number in accumulate(counts)]


def _first(media: Files, number: int) -> Files:
    """Return the first `number` of several images; all, if that is 0."""
    kind = "image" if number == 1 else "frames"
    return replace(media, kind=kind, names=media.names[: number or None], called=media.called[: number or None])


def _given(record: dict[str, Any]) -> list[str]:
    """Return the keys of media that are not empty."""
    return [key for key in MEDIA_KEYS if record.get(key) not in (None, "", [])]


def _media(record: dict[str, Any], root: Path, rate: Callable[[Path], float]) -> Files | None:
    given = _given(record)
    if len(given) != 1:
        if not given and "audio" not in record:
            _refuse_elsewhere(record)
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


def _refuse_elsewhere(record: dict[str, Any]) -> None:
    """Raise BadRecordError if a record names an image or video under a key that is not read."""
    for key, value in record.items():
        for one in value if isinstance(value, list) else [value]:
            # An id may look like the name of a file.
            if key != "id" and isinstance(one, str) and Path(one).suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
                raise BadRecordError(
                    f"expected media under {', '.join(MEDIA_KEYS)}, found {one[:80]!r} under {key[:60]!r}; "
                    "rename the key"
                )
