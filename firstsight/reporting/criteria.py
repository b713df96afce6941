"""Whether students are good enough: four figures of each against the levels that `report.criteria` sets."""

from dataclasses import dataclass

from firstsight.core.params import Criteria, Levels

# In which table each figure is found.
_FIGURES = {"compression": "performance", "memory_saved": "performance", "speed_up": "performance"}
MEANING = {
    "compression": "teacher's weights on disk / its own",
    "memory_saved": "of the teacher's peak memory",
    "speed_up": "teacher's latency / its own",
    "retention": "its exact match / teacher's",
}


@dataclass(frozen=True)
class Verdict:
    """A student's figure and the highest level it reaches; None for both where there is no figure or no level."""

    criterion: str
    variant: str
    figure: float | None
    reached: str | None
    levels: Levels


def verdicts(criteria: Criteria, quality: dict, performance: dict) -> list[Verdict]:
    """By criterion, of every student that was distilled; `quality` and `performance` are as in metrics/."""
    found = []
    for criterion in Criteria.model_fields:
        levels = getattr(criteria, criterion)
        for variant in performance:
            if variant.startswith("student-"):
                table = performance if criterion in _FIGURES else quality
                figure = table[variant].get(criterion)
                found.append(Verdict(criterion, variant, figure, _reached(levels, figure), levels))
    return found


def _reached(levels: Levels, figure: float | None) -> str | None:
    if figure is None:
        return None
    return next((name for name in ("stretch", "target", "minimum") if figure >= getattr(levels, name)), None)
