"""Which split a group belongs to, and which records of a split are taken."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

from firstsight.core.params import Data

SplitName = Literal["train", "validation", "test"]
# What two splits have in common stays in the one that is held back more: the first of these.
HELD_BACK: tuple[SplitName, ...] = ("test", "validation", "train")


def split_of(group: str, data: Data) -> SplitName:
    """From the seed and the group's name alone: adding records moves no other record."""
    place = _place(f"{data.seed}:{group}")
    if place < data.test_fraction:
        return "test"
    return "validation" if place < data.test_fraction + data.validation_fraction else "train"


def stratified(type_of: Mapping[str, str], count: int, seed: int) -> set[str]:
    """`count` ids (all, where there are fewer), each question type in its proportion, by largest remainder.

    Args:
        type_of: the question type of each id.

    A question's rank within its type depends on the seed and its id alone.
    """
    by_type: dict[str, list[str]] = defaultdict(list)
    for name, question_type in type_of.items():
        by_type[question_type].append(name)
    share = min(1.0, count / max(1, len(type_of)))
    quotas = {kind: int(len(names) * share) for kind, names in by_type.items()}
    rest = min(count, len(type_of)) - sum(quotas.values())
    remainders = sorted(by_type, key=lambda kind: (quotas[kind] - len(by_type[kind]) * share, kind))
    for kind in remainders[:rest]:
        quotas[kind] += 1
    return {
        name
        for kind, names in by_type.items()
        for name in sorted(names, key=lambda name: _place(f"{seed}:take:{name}"))[: quotas[kind]]
    }


def _place(text: str) -> float:
    """In [0, 1), as good as at random."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
