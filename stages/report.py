"""Put the variants' figures side by side: git-tracked metrics, plots, figures and an HTML page.

    python -m stages.report

reads  evaluations/*, the training histories, the quantized layers' errors, where the models came from, the data card
       and the train and test splits, by `report` in params.yaml
writes metrics/metrics.json, the few figures that DVC compares; all others in
       metrics/{models,quality,performance,training,quantization}.json; metrics/summary.txt, metrics/plots/ and
       metrics/report.html
"""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from numpy import ndenumerate
from pandas import DataFrame

from firstsight.core import params
from firstsight.core.errors import UserError
from firstsight.core.files import read_json, whole_folder, write_json
from firstsight.core.stage import log, main
from firstsight.core.variants import CONTROL, LEFT_OUT, METHODS, TEACHER, VARIANTS
from firstsight.evaluation.class_quality import confusion
from firstsight.evaluation.metrics import is_right
from firstsight.evaluation.perplexity import loss_table, perplexity
from firstsight.records.parquet import Split
from firstsight.records.sample import Record, Sample, Text
from firstsight.records.text_loss import TextLoss
from firstsight.reporting import criteria, figures, headline, report_page, summary, summary_text
from firstsight.reporting.contact_sheet import contact_sheet
from firstsight.reporting.measure import TEXTS, measure_of
from firstsight.reporting.summary import Measured

DATA, OUTPUT = Path("data/egoqa"), Path("metrics")
WRITTEN = {f"{name}.json" for name in ("metrics", "models", "quality", "performance", "training", "quantization")}
WRITTEN |= {"summary.txt", "report.html", "plots"}
# Samples and columns of the contact sheet.
SAMPLES_SHOWN, COLUMNS = 12, 3
HISTORIES = {
    "finetune-teacher": Path("models/teacher-finetuned/history.json"),
    "distill": Path("models/student-distilled/history.json"),
}
MODELS = {role: Path("models") / role / "source.json" for role in ("teacher", "student")}


def run() -> None:
    settings = params.load()
    test = Split(DATA / "test.parquet")
    questions = [(sample, record) for sample in test for record in sample.records]
    records, groups = [record for _, record in questions], [sample.group for sample, _ in questions]
    sources = {role: read_json(path, "download-models") for role, path in MODELS.items()}
    always = {TEACHER} if sources["teacher"] else set()
    found = {variant: measured(variant, records, may_be_left_out=variant not in always) for variant in VARIANTS}
    variants = {variant: one for variant, one in found.items() if one}
    histories = {stage: read_json(path, stage) for stage, path in HISTORIES.items()}
    if not sources["teacher"]:  # all that is trained then
        histories["finetune-student"] = read_json(VARIANTS[CONTROL].model / "history.json", "finetune-student")
    quantized = {
        method: read_json(VARIANTS[f"student-{method}"].model / "quantization.json", f"quantize-student@{method}")
        for method in METHODS
    }
    quantized = {method: one for method, one in quantized.items() if one}

    train = Split(DATA / "train.parquet")
    resampling = settings.evaluate.bootstrap_samples, settings.evaluate.seed
    if isinstance(records[0], Text):
        quality = summary.texts_table(variants, groups, *resampling)
    else:
        quality = summary.quality_table(variants, records, groups, summary.baselines(train, records), *resampling)
    performance = summary.performance_table(variants)
    models = summary.models_table(sources)
    quantization = summary.quantization_table(quantized)
    training = {
        stage: summary.training_summary(rows, "objective" if stage == "finetune-teacher" else settings.train.best)
        for stage, rows in histories.items()
    }
    verdicts = criteria.verdicts(settings.report.criteria, quality, performance)
    unjudged = criteria.not_judged(settings.report.criteria, verdicts, quality)
    control = Path("evaluations") / CONTROL / LEFT_OUT
    left_out = None if CONTROL in quality else read_json(control, f"evaluate@{CONTROL}")
    opening = [
        headline.subject(models, quality, performance),
        headline.headline(quality, settings.control, left_out),
    ]
    curves = {stage: summary.training_curve(history) for stage, history in histories.items()}
    environments = {
        variant: {name: one.performance[name] for name in ("device", "engine", "precision")}
        for variant, one in variants.items()
    }

    with whole_folder(OUTPUT) as folder:
        keep_others(folder)
        write_json(folder / "metrics.json", summary.key_figures(quality, performance, training))
        write_json(folder / "models.json", models)
        write_json(folder / "quality.json", quality)
        write_json(folder / "performance.json", performance)
        write_json(folder / "training.json", training)
        write_json(folder / "quantization.json", quantization)
        summary_lines = summary_text.summary(opening, quality, performance, verdicts, unjudged, environments)
        (folder / "summary.txt").write_text(summary_lines, encoding="utf-8")
        samples = [train[index] for index in spread(len(train), SAMPLES_SHOWN)]
        sweep = summary.sweep_point(settings.train, quality)
        pictures = draw(folder / "plots", variants, quality, performance, quantized, curves, sweep, samples)
        if test.classes:
            pictures |= draw_classes(folder / "plots", variants, test.classes, [record.answer for record in records])
        report_page.write(
            folder / "report.html",
            report_page.Shown(
                quality=quality,
                performance=performance,
                models=models,
                quantization=quantization,
                opening=opening,
                verdicts=verdicts,
                unjudged=unjudged,
                environments=environments,
                card=read_json(DATA / "card.json", "build-egoqa-dataset"),
                samples=samples,
                parameters=params.PARAMS_FILE.read_text(encoding="utf-8"),
                pictures=pictures,
                questions=questions,
                predictions={variant: one.predictions for variant, one in variants.items()},
            ),
        )
    log.info("%s\nwrote %s", summary_lines, OUTPUT)


def keep_others(folder: Path) -> None:
    """Copy files of metrics/ that this stage does not write, such as a user's notes, into `folder`."""
    for path in OUTPUT.glob("*"):
        if path.name not in WRITTEN:
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, folder / path.name)


def measured(variant: str, records: Sequence[Record], *, may_be_left_out: bool) -> Measured | None:
    """Return what `evaluate` wrote for a variant, or None if params.yaml leaves it out (never a teacher there is).

    Raises:
        UserError: a file is missing or broken, lacks figures, has answers to other questions, or the figures are not
            those of the answers.
    """
    folder, stage = Path("evaluations") / variant, f"evaluate@{variant}"
    if may_be_left_out and (folder / LEFT_OUT).exists():
        return None
    quality, performance, predictions = (
        read_json(folder / f"{name}.json", stage) for name in ("quality", "performance", "predictions")
    )
    if wrong := summary.unusable(quality, performance):
        raise UserError(f"{folder}: expected the figures of this version, found {wrong}; run dvc repro {stage}")
    texts = isinstance(records[0], Text)
    ids = [entry["id"] for entry in predictions if texts or isinstance(entry["answer"], str)]
    if ids != [record.id for record in records]:
        raise UserError(
            f"{folder}/predictions.json: expected answers to the {len(records)} questions of {DATA}/test.parquet, "
            f"found {len(ids)} to others; run dvc repro {stage}"
        )
    if texts:
        return measured_of_texts(quality, performance, predictions, folder)
    answers = [entry["answer"] for entry in predictions]
    right = sum(is_right(record, answer) for record, answer in zip(records, answers, strict=True))
    if round(quality["exact_match"] * len(records), 6) != right:
        raise UserError(
            f"{folder}/quality.json: expected the figures of predictions.json, {right:g} of {len(records)} answers "
            f"right, found an exact match of {quality['exact_match']:g}; run dvc repro {stage}"
        )
    return Measured(quality, performance, answers)


def measured_of_texts(quality: dict, performance: dict, predictions: list[dict], folder: Path) -> Measured:
    """Return what `evaluate` wrote of texts.

    Raises:
        UserError: the figures are not those of the losses.
    """
    losses = [TextLoss(*(entry[name] for name in ("nats", "tokens", "bytes", "cut"))) for entry in predictions]
    found = perplexity(loss_table(losses))
    if not math.isclose(found, quality["perplexity"], rel_tol=1e-9):
        raise UserError(
            f"{folder}/quality.json: expected the figures of predictions.json, a perplexity of {found:g}, found "
            f"{quality['perplexity']:g}; run dvc repro evaluate@{folder.name}"
        )
    said = [f"perplexity {perplexity(loss_table([loss])):.1f}" for loss in losses]
    continued = [f": … {entry['continuation']}" if "continuation" in entry else "" for entry in predictions]
    return Measured(quality, performance, [a + b for a, b in zip(said, continued, strict=True)], losses)


def draw(
    plots: Path,
    variants: dict[str, Measured],
    quality: dict,
    performance: dict,
    quantized: dict[str, dict],
    curves: dict[str, dict],
    sweep: DataFrame,
    samples: Sequence[Sample],
) -> dict[str, Path]:
    """Write the data of DVC's plots, and the figures, into `plots`; return the page's figures by caption."""
    plots.mkdir()
    texts = measure_of(quality) is TEXTS
    types = summary.by_type({} if texts else {variant: one.quality["by_type"] for variant, one in variants.items()})
    tables = {"variants": summary.points(quality, performance), "by-type": types, "sweep": sweep}
    for stage, splits in curves.items():
        (plots / stage).mkdir()
        tables |= {f"{stage}/{split}": losses for split, losses in splits.items()}
    for name, table in tables.items():
        table.to_csv(plots / f"{name}.csv", index=False, lineterminator="\r\n")

    # Few colours, because the file is in git.
    contact_sheet(samples, COLUMNS).quantize(64).save(plots / "contact-sheet.png", optimize=True)
    opening = {}
    before, after = summary.before_and_after(quality)
    if before in quality and not texts:
        figures.gain(quality, types, plots / "gain.png")
        added = "distilling" if TEACHER in quality else "fine-tuning"
        opening[f"What {added} added to exact match, with 95% intervals; right, {before} → {after}"] = (
            plots / "gain.png"
        )
    figures.quality(quality, list(performance), plots / "quality.png")
    figures.quality_against_cost(quality, performance, plots / "quality-against-cost.png")
    if not texts:
        figures.by_type(types, plots / "by-type.png")
    figures.throughput(performance, plots / "throughput.png")
    figures.training(curves, plots / "training.png")
    label = measure_of(quality).label.capitalize()
    corner = "down and to the left" if texts else "up and to the left"
    pictures = opening | {
        f"{label} on the test split": plots / "quality.png",
        f"Quality against latency and memory: {corner} is better": plots / "quality-against-cost.png",
    }
    if not texts:
        pictures["Exact match by question type (how many questions)"] = plots / "by-type.png"
    pictures |= {
        "Answers a second by batch size": plots / "throughput.png",
        "Training and validation loss": plots / "training.png",
    }
    if quantized:
        figures.quantization({method: one["errors"] for method, one in quantized.items()}, plots / "quantization.png")
        pictures["What quantizing changes in each layer's output"] = plots / "quantization.png"
    return pictures


def draw_classes(
    plots: Path, variants: dict[str, Measured], classes: Sequence[str], truth: Sequence[str]
) -> dict[str, Path]:
    """Write the confusion matrix of each variant as data, and of teacher and trained student as a figure by caption."""
    matrices = {name: confusion(classes, truth, one.predictions) for name, one in variants.items()}
    rows = [
        (name, classes[true], classes[predicted], count)
        for name, counts in matrices.items()
        for (true, predicted), count in ndenumerate(counts)
    ]
    columns = ["variant", "true", "predicted", "questions"]
    DataFrame(rows, columns=columns).to_csv(plots / "confusion.csv", index=False, lineterminator="\r\n")
    shown = {name: matrices[name] for name in (TEACHER, *summary.before_and_after(matrices)) if name in matrices}
    figures.confusion(shown, classes, plots / "confusion.png")
    return {"Which classes are taken for which: a row for each true class": plots / "confusion.png"}


def spread(length: int, count: int) -> range:
    """Return at most `count` indices, evenly spaced over `length`."""
    return range(0, length, max(1, -(-length // count)))


if __name__ == "__main__":
    main(run, ())
