"""Make the data card: what a data set contains, and what was left out of it and why."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from firstsight.assembly.assemble import Unit
from firstsight.assembly.decoding import Decoded
from firstsight.core.params import Data
from firstsight.readers.problems import Problems
from firstsight.records.sample import SPLITS
from firstsight.scenes.templates import template_of

# The name of the source whose questions are made from templates.
SYNTHETIC = "synthetic"


def data_card(
    data: Data,
    commit: str | None,
    written: Sequence[tuple[Unit, Decoded]],
    dropped: Mapping[str, int],
    problems: Problems,
) -> dict[str, Any]:
    """Return the card as JSON: counts by split, source, kind and question type, lengths in words, sizes of the frames.

    `commit` is the commit of a hub data set, else None. Token counts depend on a tokenizer, so they are in the index of
    the distillation targets instead.
    """
    splits = {}
    for split in SPLITS:
        found = [one for one in written if one[0].split == split]
        splits[split] = _split(found)
        if data.classes:
            splits[split]["classes"] = _counts(one.answer for unit, _ in found for one in unit.questions if one.answer)
        if limit := getattr(data, f"{split}_samples"):
            splits[split]["asked_for"] = limit
    return {
        "source": data.source,
        "commit": commit,
        **({"classes": data.classes} if data.classes else {}),
        "splits": splits,
        "dropped": dict(sorted(dropped.items())),
        "problems": problems.card(),
    }


def _split(found: Sequence[tuple[Unit, Decoded]]) -> dict[str, Any]:
    questions = [one for unit, _ in found for one in unit.questions]
    answers = [text for one in questions for text in one.accepted()[:1] if not one.options]
    sizes = [decoded.size for unit, decoded in found if unit.media]
    return {
        "samples": len(found),
        "records": len(questions),
        "groups": len({unit.group for unit, _ in found}),
        "multiple_choice": sum(bool(one.options) for one in questions),
        "unanswered": sum(not one.accepted() for one in questions),
        "sources": _counts(unit.source for unit, _ in found for _ in unit.questions),
        "media_kinds": _counts(unit.media.kind if unit.media else "none" for unit, _ in found),
        "question_types": _counts(one.question_type for one in questions),
        "templates": _counts(
            template_of(one.id) for unit, _ in found if unit.source == SYNTHETIC for one in unit.questions
        ),
        "question_words": _spread([len(one.question.split()) for one in questions]),
        "answer_words": _spread([len(text.split()) for text in answers]),
        "questions_a_sample": _spread([len(unit.questions) for unit, _ in found]),
        "frames": _spread([frames for frames, _, _, _ in sizes]),
        "picture_sizes": _counts(f"{width} x {height}" for _, width, height, _ in sizes),
        "media_megabytes": round(sum(size for *_, size in sizes) / 1e6, 3),
    }


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _spread(numbers: Sequence[int]) -> dict[str, float]:
    """Return minimum, median, mean and maximum; empty without numbers."""
    if not numbers:
        return {}
    return {
        "least": int(min(numbers)),
        "median": float(np.median(numbers)),
        "mean": round(float(np.mean(numbers)), 3),
        "most": int(max(numbers)),
    }
