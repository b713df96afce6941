"""The model card of a student: what it is, how it was made, what was measured, how to load it.

The hub reads the block between the two `---` lines (https://huggingface.co/docs/hub/model-cards).
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from firstsight.reporting.table import size


def model_card(
    variant: str,
    *,
    quality: dict[str, dict[str, float]],
    performance: dict[str, dict[str, float]],
    models: dict[str, dict[str, Any]],
    data: dict[str, Any],
    parameters: str,
) -> str:
    """README.md of the variant's folder, filled in from the git-tracked metrics, the data card and params.yaml."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    templates.filters["size"] = size
    return templates.get_template("card.md.jinja").render(
        variant=variant,
        own=quality[variant],
        speed=performance[variant],
        teacher=quality["teacher"],
        teacher_speed=performance["teacher"],
        guess=quality["question-only"]["exact_match"],
        models=models,
        base=models["student"]["source"],
        on_hub="/" in models["student"]["source"] and not Path(models["student"]["source"]).exists(),
        data=data,
        parameters=parameters,
    )
