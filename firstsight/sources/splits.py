"""Which split a group belongs to, and the removal of duplicates."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from firstsight.core.params import Data
from firstsight.data.records import Sample


def split_of(group: str, data: Data) -> str:
    """train, validation or test, from the seed and the group's name alone: adding records moves no other record."""
    digest = hashlib.sha256(f"{data.seed}:{group}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < data.test_fraction:
        return "test"
    return "validation" if place < data.test_fraction + data.validation_fraction else "train"


def without_duplicates(
    samples: Iterable[tuple[Sample, str | None]], dropped: Counter
) -> Iterator[tuple[Sample, str | None]]:
    """The samples less their exact duplicates: the same question about the same frames. Counted in `dropped`.

    Records that become a sample's only copy keep their place; a sample left without records is left out. The same
    frames under two names of group would straddle splits, so the later sample takes the earlier one's group.
    """
    asked: set[bytes] = set()
    group_of: dict[bytes, tuple[str, str | None]] = {}
    for sample, given in samples:
        media = hashlib.sha256(b"".join(hashlib.sha256(frame).digest() for frame in sample.frames)).digest()
        if sample.frames:
            group, given = group_of.setdefault(media, (sample.group, given))
            sample = replace(sample, group=group)
        kept = []
        for record in sample.records:
            key = hashlib.sha256(media + record.prompt().encode()).digest()
            if key in asked:
                dropped["duplicate"] += 1
            else:
                asked.add(key)
                kept.append(record)
        if kept:
            yield replace(sample, records=tuple(kept)), given
