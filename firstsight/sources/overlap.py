"""Videos that two sources share, by the ids in their names."""

import re
from collections.abc import Iterable

_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def video_ids(names: Iterable[str]) -> set[str]:
    """Ego4D's ids of videos (UUIDs), wherever they stand in the names."""
    return {found for name in names for found in _UUID.findall(name.lower())}
