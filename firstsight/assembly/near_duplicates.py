"""Remove exact copies of media, and near duplicates (recompressed, resized) that would leak from one split to another.

Media are compared by their looks: the first, middle and last frame as 12 x 12 pixels. Two are near duplicates if their
looks differ by at most 3 of 255 on average and at most 24 at any pixel: recompression and resizing stay well below, and
another object in the image does not.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from firstsight.assembly.assemble import Unit, repeated
from firstsight.assembly.decoding import Decoded
from firstsight.assembly.splits import HELD_BACK

MEAN, ANYWHERE = 3.0, 24
_ROWS = 256


def seen_in(looks: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Find the near duplicate among `others` of each of `looks`.

    Args:
        looks: uint8 [n, ...].
        others: uint8 [m, ...], of the same shape beyond the first axis.

    Returns:
        The index in `others` of the first found, or -1; int64 [n].
    """
    found = np.full(len(looks), -1)
    if not len(others):
        return found
    flat, flat_others = (part.reshape(len(part), -1) for part in (looks, others))
    # The means of 36 runs of pixels rule out nearly all pairs: the means of two looks differ less than their pixels.
    coarse, coarse_others = _bands(flat), _bands(flat_others)
    order = np.argsort(coarse_others[:, 0], kind="stable")
    sorted_first = coarse_others[order, 0]
    for row in range(len(flat)):
        low, high = np.searchsorted(sorted_first, coarse[row, 0] + np.array([-ANYWHERE, ANYWHERE]))
        near = order[low:high]
        near = near[(np.abs(coarse_others[near] - coarse[row]) <= ANYWHERE).all(1)]
        near = near[np.abs(coarse_others[near] - coarse[row]).mean(1) <= MEAN] if len(near) else near
        for start in range(0, len(near), _ROWS):
            part = np.sort(near[start : start + _ROWS])
            difference = np.abs(flat_others[part].astype(np.int16) - flat[row].astype(np.int16))
            same = part[(difference.mean(1) <= MEAN) & (difference.max(1) <= ANYWHERE)]
            if len(same):
                found[row] = same[0]
                break
    return found


def _bands(flat: np.ndarray) -> np.ndarray:
    """Return the overall mean and the means of 36 runs of pixels, float32 [n, 37]."""
    parts = flat.reshape(len(flat), 36, -1).mean(2, dtype=np.float32)
    return np.concatenate([parts.mean(1, keepdims=True), parts], 1)


def leaking(looks: Sequence[np.ndarray], splits: Sequence[str], has_media: Sequence[bool]) -> dict[int, int]:
    """Return the indices of media with a near duplicate in a more held-back split, each with the duplicate's index.

    The test split keeps all of its media, validation those not in test, and train those in neither.

    Args:
        looks: uint8 [3, LOOK, LOOK, 3] each.
        splits: the split of each.
        has_media: False for units about text alone, which are not compared.
    """
    found = {}
    split_of = np.array(splits)
    usable = np.array(has_media, dtype=bool)
    for split, held_back in (("validation", ("test",)), ("train", ("test", "validation"))):
        here = np.flatnonzero((split_of == split) & usable)
        there = np.flatnonzero(np.isin(split_of, held_back) & usable)
        if len(here) and len(there):
            same = seen_in(np.stack([looks[i] for i in here]), np.stack([looks[i] for i in there]))
            found |= {int(here[n]): int(there[other]) for n, other in enumerate(same) if other >= 0}
    return found


def without_leaks(found: Sequence[tuple[Unit, Decoded]], dropped: Counter[str]) -> list[tuple[Unit, Decoded]]:
    """Return the units without those whose media a more held-back split has too, counting their questions in `dropped`.

    All units of the same file or group are removed with them, such as other windows of a video that is a copy.
    """
    leaks = leaking(
        [decoded.look for _, decoded in found],
        [unit.split for unit, _ in found],
        [unit.media is not None for unit, _ in found],
    )
    # The most held-back split, as an index of HELD_BACK, that has each part.
    stays: dict[tuple[str, ...], int] = {}
    for index, other in leaks.items():
        held_back = HELD_BACK.index(found[other][0].split)
        for part in _parts(found[index][0]):
            stays[part] = min(held_back, stays.get(part, held_back))
    kept = []
    for unit, decoded in found:
        place = HELD_BACK.index(unit.split)
        if stays and any(stays.get(part, place) < place for part in _parts(unit)):
            dropped["media of another split"] += len(unit.questions)
        else:
            kept.append((unit, decoded))
    return kept


def _parts(unit: Unit) -> list[tuple[str, ...]]:
    """Return the group and the files of a unit, under names by which units of the same group or file are recognised."""
    files = unit.media.origins() if unit.media else ()
    return [("group", unit.source, unit.group), *(("file", name) for name in files)]


def without_copies(found: Sequence[tuple[Unit, Decoded]], dropped: Counter[str]) -> list[tuple[Unit, Decoded]]:
    """Return the units without questions repeated about the same frames, or about text alone, counted in `dropped`.

    Of equal questions, the one in the most held-back split stays; within a split, one with an answer, then the first.
    """
    asked = [(HELD_BACK.index(unit.split), decoded.digest, one) for unit, decoded in found for one in unit.questions]
    asked.sort(key=lambda one: (one[0], not one[2].accepted()))
    again = repeated(((digest, one) for _, digest, one in asked), dropped)
    kept = []
    for unit, decoded in found:
        if fresh := tuple(one for one in unit.questions if one.id not in again):
            kept.append((replace(unit, questions=fresh), decoded))
    return kept
