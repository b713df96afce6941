"""Read OpenEQA: open questions about walks through homes (HM3D) and rooms (ScanNet) (Majumdar et al. 2024).

`data.path` is `open-eqa-v0.json` (`question_id`, `question`, `answer`, `extra_answers`, `category`,
`episode_history`). An episode is the folder `{episode_history}` in the media root, as OpenEQA's own extraction writes
it:
frames such as `00000-rgb.png` among depth images and poses, of which `data.max_frames` are taken evenly, as OpenEQA's
baselines do. Or it is a video: `{episode_history}.mp4`, in its folders or directly in the media root.

The group is the home or room: ScanNet has some rooms twice, `002-scannet-scene0709_00` and `..._01`.

Source of the format: data/README.md, data/*/extract-frames.py and openeqa/baselines/gpt4v.py of
facebookresearch/open-eqa.
"""

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from firstsight.core.params import Data
from firstsight.readers.media import Files, files, first_there
from firstsight.readers.problems import BadRecordError, Problems
from firstsight.readers.source_record import Asked, source_record
from firstsight.readers.suffixes import IMAGE_SUFFIXES
from firstsight.readers.text_files import as_object, media_root, read_records


def read(data: Data, problems: Problems) -> Iterator[Asked]:
    """Yield the questions in the order of the file.

    Raises:
        UserError: the file is missing or not a JSON list.
    """
    media = functools.cache(functools.partial(_media, media_root(data), data.max_frames))
    for place, raw in read_records(Path(data.path), "OpenEQA's questions"):
        with problems.at(place):
            record = as_object(raw)
            episode = record.get("episode_history")
            if not isinstance(episode, str) or not episode.strip("/ "):
                raise BadRecordError(f"episode_history: expected text, found {repr(episode)[:60]}; correct it")
            extra = record.get("extra_answers")
            asked = source_record(
                place,
                id=record.get("question_id"),
                question=record.get("question"),
                answer=record.get("answer"),
                # In v0, one of them is empty.
                answers=[text for text in extra if text != ""] if isinstance(extra, list) else extra,
                question_type=record.get("category"),
                group=scene(episode),
            )
            yield Asked(asked, media(episode))


def scene(episode: str) -> str:
    """Return the home or room of an episode: `scannet-scene0709` for `scannet-v0/002-scannet-scene0709_00`."""
    found = re.search(r"/\d{3}-(\w+-\w+?)(?:_\d\d)?$", episode)
    return found[1] if found else episode


def _media(root: Path, most: int, episode: str) -> Files:
    """Return at most `most` frames of an episode, or its video if it has no folder of frames."""
    if frames := _frames(root / episode):
        places = np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int)
        return files(root, [f"{episode}/{frames[place]}" for place in places])
    video = first_there(root, [f"{episode}.mp4", f"{Path(episode).name}.mp4"])
    try:
        return files(root, video)
    except BadRecordError as error:
        raise BadRecordError(f"expected frames in {episode}/, or else: {error}") from None


def _frames(folder: Path) -> list[str]:
    """Return the names of a folder's frames in order: the images named *-rgb if there are any, else all images."""
    if not os.path.isdir(folder):  # noqa: PTH112, as Path.is_dir raises on names that are too long
        return []
    names = [path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."]
    return sorted([name for name in names if Path(name).stem.endswith("-rgb")] or names, key=_natural)


def _natural(name: str) -> tuple[list[str | int], str]:
    """Return a key that sorts by the numbers in names, as 2.png before 10.png, and then by their digits."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name
