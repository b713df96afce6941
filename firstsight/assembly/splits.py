"""Assign groups to splits, and sample the records of a split."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

from firstsight.core.params import Data

SplitName = Literal["train", "validation", "test"]
# From the most to the least held back: what two splits share stays in the one that comes first here.
HELD_BACK: tuple[SplitName, ...] = ("test", "validation", "train")


def split_of(group: str, data: Data) -> SplitName:
    """Return a group's split, from the seed and its name alone, so that adding records moves no other record."""
    place = _place(f"{data.seed}:{group}")
    if place < data.test_fraction:
        return "test"
    return "validation" if place < data.test_fraction + data.validation_fraction else "train"


def stratified_splits(class_of: Mapping[str, str], data: Data) -> dict[str, SplitName]:
    """Return the split of each group, so that every class has its share of each split, by largest remainder.

    Args:
        class_of: the class of each group.
    """
    left: dict[str, str] = dict(class_of)
    splits: dict[str, SplitName] = dict.fromkeys(class_of, HELD_BACK[-1])
    for split, share in zip(HELD_BACK, (data.test_fraction, data.validation_fraction), strict=False):
        taken = stratified(left, round(share * len(class_of)), data.seed)
        splits |= dict.fromkeys(taken, split)
        left = {group: kind for group, kind in left.items() if group not in taken}
    return splits


def is_labelled(group: str, data: Data) -> bool:
    """Return whether the answers of a group of the training split are kept: the share `data.labelled_fraction` is.

    It depends on the seed and the group's name alone, and a higher share keeps what a lower one kept.
    """
    return _place(f"{data.seed}:labelled:{group}") < data.labelled_fraction


def stratified(type_of: Mapping[str, str], count: int, seed: int) -> set[str]:
    """Return `count` ids (all, if there are fewer), sampled in proportion to question types by largest remainder.

    A question's rank within its type depends on the seed and its id alone.

    Args:
        type_of: the question type of each id, or its class.
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
    """Return a hash of the text as a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
