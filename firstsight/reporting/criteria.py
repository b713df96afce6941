"""Compare figures of each student made by distilling with the levels that `report.criteria` of params.yaml sets."""

from dataclasses import dataclass

from firstsight.core.params import Criteria, Levels
from firstsight.core.variants import CONTROL, EXPORTED, EXPORTED_TEACHER, STUDENTS, TEACHER
from firstsight.reporting.measure import TEXTS, measure_of

MEANING = {
    "gain": f"its exact match - that of {CONTROL}",
    "retention": "its exact match / the teacher's",
    "compression": "the teacher's weights on disk / its own",
    "weights_saved": "share of the teacher's weights in memory that it does not take",
    "speed_up": "the teacher's latency / its own, of exported students the exported teacher's",
}
_NULL = (
    "speed up is not judged, because report.criteria.speed_up is null: with models as small as the default's, what "
    "PyTorch adds to each token, not the model, decides the latency"
)
_NO_CONTROL = f"gain is not judged, because {CONTROL} is left out"
_NO_TEACHER = "no criterion is judged, because there is no teacher: they compare what distilling made with it"
_TEXTS = "gain and retention are not judged, because they are of exact answers, and texts have none"
_NO_RETENTION = "retention is not judged, because the teacher has no right answer"


def meanings(quality: dict) -> dict[str, str]:
    """Return what each criterion means that can be judged of such records."""
    of_answers = ("gain", "retention") if measure_of(quality) is TEXTS else ()
    return {criterion: meaning for criterion, meaning in MEANING.items() if criterion not in of_answers}


@dataclass(frozen=True)
class Verdict:
    """Hold a student's figure for one criterion, its 95% interval if there is one, and the highest level reached.

    `reached` is None if the figure is below the minimum.
    """

    criterion: str
    variant: str
    figure: float
    interval: tuple[float, float] | None
    reached: str | None
    levels: Levels

    def said(self) -> str:
        """Return the figure and its interval as text."""
        ends = f" ({self.interval[0]:.2f} to {self.interval[1]:.2f})" if self.interval else ""
        return f"{self.figure:.3g}{ends}"

    def judged(self) -> str:
        """Return the verdict as text."""
        return self.reached or "not met"


def verdicts(criteria: Criteria, quality: dict, performance: dict) -> list[Verdict]:
    """Return a verdict per criterion and student for which it can be computed; the tables are as in metrics/.

    Speed-up is judged of the exported students alone where the exported teacher was measured: it is the work of the
    models that is compared there, not what PyTorch adds to each token.
    Without a teacher, there is none.
    """
    found = []
    if TEACHER not in quality:
        return found
    for criterion in Criteria.model_fields:
        levels = getattr(criteria, criterion)
        in_engine = criterion == "speed_up" and EXPORTED_TEACHER in performance
        for variant in EXPORTED if in_engine else STUDENTS:
            row = quality.get(variant, {}) | performance.get(variant, {})
            if levels is None or criterion not in row:
                continue
            ends = (row[f"{criterion}_low"], row[f"{criterion}_high"]) if f"{criterion}_low" in row else None
            found.append(Verdict(criterion, variant, row[criterion], ends, _reached(levels, row[criterion]), levels))
    return found


def not_judged(criteria: Criteria, found: list[Verdict], quality: dict) -> list[str]:
    """Return a line per criterion that has no verdict among `found`: which, and why."""
    if TEACHER not in quality:
        return [_NO_TEACHER]
    judged = {one.criterion for one in found}
    if measure_of(quality) is TEXTS:
        return [_TEXTS] if criteria.speed_up else [_TEXTS, _NULL]
    reasons = {"gain": _NO_CONTROL, "retention": _NO_RETENTION}
    lines = [reason for criterion, reason in reasons.items() if criterion not in judged]
    return lines if criteria.speed_up else [*lines, _NULL]


def conclusions(found: list[Verdict]) -> list[str]:
    """Return a line per student: how many criteria it meets, and which it does not."""
    lines = []
    for variant in dict.fromkeys(one.variant for one in found):
        own = [one for one in found if one.variant == variant]
        missed = [one.criterion.replace("_", " ") for one in own if not one.reached]
        unmet = f"; not {', '.join(missed)}" if missed else ""
        lines.append(f"{variant} meets {len(own) - len(missed)} of {len(own)} criteria{unmet}")
    return lines


def _reached(levels: Levels, figure: float) -> str | None:
    return next((name for name in ("stretch", "target", "minimum") if figure >= getattr(levels, name)), None)
