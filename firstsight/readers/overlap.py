"""Videos that two sources share, by the ids in their names.

EgoIT-99K names its Ego4D videos by UUID (`Ego4d/{uuid}.mp4`, `Ego4d_clip/{uuid}-{n}.mp4`), EgoTempo's clips begin with
the video's, and EgoSchema's `uid_to_ego4d.json` has the video of each question: its `q_uid` is an id of its own.
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
    """Ids of videos, and of rooms, wherever they stand in names of media, groups or questions; in lower case."""
    return {found for name in names for found in _ID.findall(name.lower())}
