"""Compare four figures of each student with the levels that `report.criteria` of params.yaml sets."""

from dataclasses import dataclass

from firstsight.core.params import Criteria, Levels

# The table that holds each figure; the others are in the quality table.
_FIGURES = {"compression": "performance", "memory_saved": "performance", "speed_up": "performance"}
MEANING = {
    "compression": "teacher's weights on disk / its own",
    "memory_saved": "of the teacher's peak memory",
    "speed_up": "teacher's latency / its own",
    "retention": "its exact match / teacher's",
}


@dataclass(frozen=True)
class Verdict:
    """Hold a student's figure for one criterion, its 95% interval if there is one, and the highest level reached.

    `figure` is None if it was not measured; `reached` is None if it was not measured or is below the minimum.
    """

    criterion: str
    variant: str
    figure: float | None
    interval: tuple[float, float] | None
    reached: str | None
    levels: Levels

    def said(self) -> str:
        """Return the figure and its interval as text."""
        if self.figure is None:
            return "-"
        ends = f" ({self.interval[0]:.2f}-{self.interval[1]:.2f})" if self.interval else ""
        return f"{self.figure:.3g}{ends}"

    def judged(self) -> str:
        """Return the verdict as text."""
        return "no figure" if self.figure is None else self.reached or "not met"


def verdicts(criteria: Criteria, quality: dict, performance: dict) -> list[Verdict]:
    """Return a verdict per criterion and distilled student; `quality` and `performance` are as in metrics/."""
    found = []
    for criterion in Criteria.model_fields:
        levels = getattr(criteria, criterion)
        for variant in performance:
            if variant.startswith("student-"):
                table = performance if criterion in _FIGURES else quality
                row = table[variant]
                figure = row.get(criterion)
                ends = (row[f"{criterion}_low"], row[f"{criterion}_high"]) if f"{criterion}_low" in row else None
                found.append(Verdict(criterion, variant, figure, ends, _reached(levels, figure), levels))
    return found


def conclusions(found: list[Verdict]) -> list[str]:
    """Return a line per student: how many criteria it meets, and which it does not."""
    lines = []
    for variant in dict.fromkeys(one.variant for one in found):
        own = [one for one in found if one.variant == variant]
        missed = [one.criterion.replace("_", " ") for one in own if not one.reached]
        unmet = f"; not {', '.join(missed)}" if missed else ""
        lines.append(f"{variant} meets {len(own) - len(missed)} of {len(own)} criteria{unmet}")
    return lines


def _reached(levels: Levels, figure: float | None) -> str | None:
    if figure is None:
        return None
    return next((name for name in ("stretch", "target", "minimum") if figure >= getattr(levels, name)), None)
