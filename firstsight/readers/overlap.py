"""Find the ids of videos in names, by which two sources that share a video are recognised.

EgoIT-99K names its Ego4D videos by UUID (`Ego4d/{uuid}.mp4`, `Ego4d_clip/{uuid}-{n}.mp4`), the names of EgoTempo's
clips begin with the video's UUID, and EgoSchema's `uid_to_ego4d.json` has the video of each question, whose `q_uid` is
unrelated to it.
"""

import re
from collections.abc import Iterable

_IDS = (
    r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",  # Ego4D
    r"(?<![a-z0-9])p\d{2}_\d{2,3}(?![a-z0-9])",  # EPIC-Kitchens
    r"scene\d{4}(?!\d)",  # ScanNet: scans of one room differ in a further number
)
_ID = re.compile("|".join(_IDS))


def video_ids(names: Iterable[str]) -> set[str]:
    """Return the ids of videos and rooms found anywhere in names of files, groups or questions, in lower case."""
    return {found for name in names for found in _ID.findall(name.lower())}
