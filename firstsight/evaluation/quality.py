"""The quality figures of one variant, overall and by question type."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from firstsight.data.records import Record
from firstsight.evaluation.metrics import Scores, bleu, bootstrap_interval, score


def summarise(records: Sequence[Record], predicted: Sequence[str], bootstrap_samples: int, seed: int) -> dict[str, Any]:
    """Means over the records, each in [0, 1], with 95% intervals of exact match and F1, and exact match by type."""
    scores = [score(record, answer) for record, answer in zip(records, predicted, strict=True)]
    columns = {name: [getattr(one, name) for one in scores] for name in Scores.__dataclass_fields__}
    with_options = [number for number, record in enumerate(records) if record.options]
    summary: dict[str, Any] = {"questions": len(records)}
    summary |= {name: float(np.mean(columns[name])) for name in ("exact_match", "f1", "rouge_l")}
    summary["bleu"] = bleu(records, predicted)
    for name in ("exact_match", "f1"):
        summary[f"{name}_low"], summary[f"{name}_high"] = bootstrap_interval(columns[name], bootstrap_samples, seed)
    if with_options:
        summary["option_accuracy"] = float(np.mean([columns["exact_match"][number] for number in with_options]))
        summary["options_unparsed"] = int(sum(columns["unparsed"]))
    by_type: dict[str, list[float]] = {}
    for record, right in zip(records, columns["exact_match"], strict=True):
        by_type.setdefault(record.question_type, []).append(right)
    summary["exact_match_by_type"] = {name: float(np.mean(values)) for name, values in sorted(by_type.items())}
    return summary
