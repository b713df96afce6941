"""Name the images and videos that records ask about: files below a folder, which are decoded when they are loaded."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from firstsight.core.params import Data
from firstsight.readers.image_decoding import read_image
from firstsight.readers.problems import BadRecordError
from firstsight.readers.source_record import DecodedMedia
from firstsight.readers.suffixes import VIDEO_SUFFIXES, VIDEOS
from firstsight.readers.video_decoding import read_video
from firstsight.records.sample import MediaKind


@dataclass(frozen=True)
class Files:
    """Name an image file, a video file or a list of frame files, below `root`.

    `names` are paths relative to the root with symbolic links resolved, so that a file has one name; `called` are the
    names that the source uses. `start` and `end` are a window of a video in seconds; an `end` of None is the video's
    end.
    """

    kind: MediaKind
    root: Path
    names: tuple[str, ...]
    start: float = 0.0
    end: float | None = None
    called: tuple[str, ...] = field(default=(), compare=False)

    def key(self) -> str:
        window = (self.start, self.end) if self.kind == "video" else ()
        return json.dumps([*self.names, *window], ensure_ascii=False)

    def group(self) -> tuple[str, ...]:
        return self.names

    def titles(self) -> tuple[str, ...]:
        return (*self.names, *self.called)

    def origins(self) -> tuple[str, ...]:
        return tuple(str(self.root.resolve() / name) for name in self.names)

    def stamp(self) -> object:
        found = [(self.root / name).stat() for name in self.names]
        return [str(self.root), *((one.st_size, one.st_mtime_ns) for one in found)]

    def load(self, data: Data) -> DecodedMedia:
        paths = [self.root / name for name in self.names]
        if self.kind == "video":
            return DecodedMedia(*read_video(paths[0], data, self.start, self.end))
        return DecodedMedia(tuple(read_image(path, data) for path in paths))


def files(root: Path, media: str | Sequence[str], start: float | None = None, end: float | None = None) -> Files:
    """Return the media at paths relative to `root`, or absolute and below it: a list of frames, a video or an image.

    A single path is a video if it has a suffix of `VIDEO_SUFFIXES`, and else an image.

    Raises:
        BadRecordError: a file is missing or not below `root`, or a window is given for something that is not a video.
    """
    names = [media] if isinstance(media, str) else list(media)
    if not names:
        raise BadRecordError("expected media, found an empty list; name files, or remove the record")
    inside = tuple(_inside(root, name) for name in names)
    if not isinstance(media, str):
        kind = "frames"
    else:
        kind = "video" if Path(media).suffix.lower() in VIDEO_SUFFIXES else "image"
    if kind != "video" and (start or end):
        raise BadRecordError(
            f"expected start and end with a video alone, found them with media {str(media)[:80]!r}; "
            f"remove them ({VIDEOS})"
        )
    return Files(kind, root, inside, float(start or 0), None if end is None else float(end), tuple(names))


def _inside(root: Path, name: str) -> str:
    """Return a file's path relative to `root` with links resolved. Raise BadRecordError if it is missing or outside."""
    if "://" in name:
        raise BadRecordError(
            f"expected a path, found the address {name[:80]!r}, which is not downloaded; download it and give its path"
        )
    try:
        resolved, base = (root / name).resolve(), root.resolve()
        found = resolved.is_file()
        inside = resolved.relative_to(base).as_posix() if resolved.is_relative_to(base) else None
        f"{name}{resolved}".encode()  # raises for names that cannot be written as UTF-8
    except (OSError, ValueError, RuntimeError) as error:
        raise BadRecordError(
            f"expected a media file, found {name[:80]!r} ({str(error)[:80]}); correct the path"
        ) from None
    if inside is None:
        raise BadRecordError(
            f"expected media below {root}, found {name[:80]!r}, which is {resolved}; "
            "move it there, or set media_root to a folder that holds all media"
        )
    if not found:
        raise BadRecordError(
            f"expected a media file, found no {root / name}; correct the path (it is relative to {root}), "
            "or remove the record"
        )
    return inside


def first_there(root: Path, names: Sequence[str]) -> str:
    """Return the first of `names` that is a file below `root`, else the first, which `files` then reports missing."""
    return next((name for name in names if os.path.isfile(root / name)), names[0])  # noqa: PTH113, Path.is_file raises
