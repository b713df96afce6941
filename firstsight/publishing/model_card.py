"""Write the model card of a student: what it is, how to use it, what was measured, how it was made.

The figures come from metrics/, the rest from the data card and params.yaml.
"""

import json
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from firstsight.core import params, yaml12
from firstsight.core.classes import template_columns
from firstsight.core.errors import UserError
from firstsight.core.files import read_json
from firstsight.core.variants import CONTROL, EXPORTED, EXPORTED_TEACHER, TEACHER
from firstsight.reporting.headline import origin
from firstsight.reporting.measure import TEXTS, measure_of
from firstsight.reporting.text_table import size

METRICS, DATA = Path("metrics"), Path("data/egoqa/card.json")
# The hub's licence identifiers that base models commonly have; any other licence is "other" there, with its name.
IDENTIFIERS = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0")
# What transformers needs to load the folders of each method of quantization.
LIBRARIES = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "int4": "compressed-tensors"}
# Settings that the card shows: how the model was made and measured, without local paths of models and data.
SECTIONS = ("finetune_teacher", "targets", "train", "quantize", "export", "evaluate")


def model_card(variant: str, place: str) -> str:
    """Return the text of README.md for the variant's folder.

    Args:
        place: where readers load the model from, a hub repository or a folder.

    Raises:
        UserError: metrics/ has no figures of the variant.
    """
    quality, performance, models = (
        read_json(METRICS / f"{name}.json", "report") for name in ("quality", "performance", "models")
    )
    if variant not in quality or variant not in performance:
        raise UserError(
            f"{METRICS}: expected figures of {variant}, found those of {', '.join(performance)}; "
            "ask for it in params.yaml, and dvc repro measures it"
        )
    loaded = params.load()
    distilled, task = variant != CONTROL and "teacher" in models, _task(models["student"], Path("models") / variant)
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    templates.filters["size"] = size
    # Speed and memory of an exported model are comparable with those of a teacher in the same engine.
    teacher = EXPORTED_TEACHER if variant in EXPORTED and EXPORTED_TEACHER in performance else TEACHER
    return templates.get_template("card.md.jinja").render(
        metadata=_metadata(models["student"], "onnx" if variant in EXPORTED else "transformers", distilled, task),
        text=task != "image-text-to-text",
        encoder=task == "text-classification",
        classes=list(quality[variant].get("by_class", ())),
        asked=_asked(loaded.data.prompt),
        variant=variant,
        place=place,
        local=place == f"models/{variant}",
        quantized_by=LIBRARIES.get(variant.removeprefix("student-")),
        exported=variant in EXPORTED,
        distilled=distilled,
        rows=_rows(
            quality[variant] | performance[variant], quality.get(TEACHER, {}) | performance.get(teacher, {}), quality
        ),
        texts=measure_of(quality) is TEXTS,
        questions=quality[variant][measure_of(quality).what],
        parameters=performance[variant]["parameters"],
        own=_environment(variant),
        teacher=_environment(teacher) if "teacher" in models else {},
        models={role: source | {"source": origin(source)} for role, source in models.items()},
        data=read_json(DATA, "build-egoqa-dataset"),
        sampling=loaded.data,
        max_new_tokens=loaded.evaluate.asked_tokens(),
        settings=yaml12.dump(loaded.model_dump(include=set(SECTIONS))).strip(),
    )


def _environment(variant: str) -> dict[str, Any]:
    """Return the figures of a variant's evaluation, which say in what and where it computed."""
    return read_json(Path("evaluations") / variant / "performance.json", f"evaluate@{variant}")


def _task(student: dict[str, Any], folder: Path) -> str:
    """Return what the hub calls the task of the model in `folder` (https://huggingface.co/docs/hub/models-tasks).

    `student` is the row of metrics/models.json of the model that it was trained from. An encoder is one with a head for
    classes afterwards, which the folder's config.json says.
    """
    config = folder / "config.json"
    made = read_json(config, "the stage that makes it").get("architectures") if config.exists() else None
    if any(name.endswith("ForSequenceClassification") for name in made or ()):
        return "text-classification"
    alone = student["architecture"] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return "text-generation" if alone else "image-text-to-text"


def _asked(template: str | None) -> str:
    """Return the words of a shell that ask a model of text alone, whose prompt template is given, if it has one."""
    columns = template_columns(template) if template else []
    if len(columns) > 1:
        return shlex.quote(json.dumps(dict.fromkeys(columns, "..."), ensure_ascii=False))
    return '"The text of a record."' if template else '"What is in the cup?"'


def _metadata(student: dict[str, Any], library: str, distilled: bool, task: str) -> str:
    """Return the card's metadata: YAML between two lines of dashes (https://huggingface.co/docs/hub/model-cards)."""
    licence, text = student["licence"], task != "image-text-to-text"
    licences = {"license": licence}
    if licence and licence not in IDENTIFIERS:
        licences = {"license": "other", "license_name": licence}
    data = ModelCardData(
        library_name=library,
        pipeline_tag=task,
        # Only a model with a commit came from the hub; a local folder or fresh weights are no base model there.
        base_model=student["source"] if student["commit"] else None,
        tags=[*([] if text else ["egocentric"]), *(["distillation"] if distilled else []), "firstsight"],
        **licences,
    )
    return f"---\n{data.to_yaml()}\n---"


def _rows(own: dict, teacher: dict, quality: dict) -> list[tuple[str, str, str]]:
    """Return label, this model's figure and the teacher's for every figure that was measured."""

    def share(figures: dict, name: str) -> str:
        low, high = figures.get(f"{name}_low"), figures.get(f"{name}_high")
        interval = "" if low is None else f" ({low:.2f} to {high:.2f})"
        return f"{figures[name]:.3f}{interval}"

    def number(figures: dict, name: str) -> str:
        return f"{figures[name]:.2f} ({figures[f'{name}_low']:.2f} to {figures[f'{name}_high']:.2f})"

    figures = [
        ("perplexity of a token", "perplexity", number),
        ("bits per byte", "bits_per_byte", share),
        ("ROUGE-1 of continuations", "rouge_1", share),
        ("ROUGE-2 of continuations", "rouge_2", share),
        ("ROUGE-L of continuations" if "perplexity" in own else "ROUGE-L", "rouge_l", share),
        ("accuracy" if "macro_f1" in own else "exact match", "exact_match", share),
        ("macro-F1", "macro_f1", share),
        *([] if "macro_f1" in own else [("F1", "f1", share)]),
        ("expected calibration error", "calibration_error", share),
        ("accuracy of questions with options", "option_accuracy", share),
        ("parameters", "parameters", lambda figures, name: size(figures[name], "")),
        ("weights on disk", "disk_bytes", lambda figures, name: size(figures[name])),
        ("weights in memory", "weights_bytes", lambda figures, name: size(figures[name])),
        ("memory at most, batch 1", "peak_bytes", lambda figures, name: size(figures[name])),
        ("latency of an answer, median", "latency_ms_p50", lambda figures, name: f"{figures[name]:.1f} ms"),
    ]
    rows = [
        (label, shown(own, name), shown(teacher, name) if name in teacher else "")
        for label, name, shown in figures
        if name in own
    ]
    if "teacher_agreement" in own:
        rows.append(("the same answer as the teacher", share(own, "teacher_agreement"), ""))
    if guess := quality.get("question-only"):
        rows.append(("best guess without looking, exact match", f"{guess['exact_match']:.3f}", ""))
    return rows
