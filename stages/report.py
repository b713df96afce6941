"""Put the variants' figures side by side: git-tracked metrics, plots, pictures and a page to look at.

    python -m stages.report

reads  evaluations/*/*.json, the training histories, where the models came from, the data card and the train and test
       splits
writes metrics/{models,quality,performance,training}.json, metrics/plots/ and metrics/report.html
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from firstsight.core import params
from firstsight.core.files import read_json, whole_folder, write_json
from firstsight.core.stage import log, main
from firstsight.data.records import Split
from firstsight.reporting import figures, page, summary
from firstsight.reporting.contact_sheet import contact_sheet

DATA, OUTPUT = Path("data/egoqa"), Path("metrics")
# Of the contact sheet.
SAMPLES_SHOWN, COLUMNS = 12, 3
HISTORIES = {
    "finetune-teacher": Path("models/teacher-finetuned/history.json"),
    "distill": Path("models/student-distilled/history.json"),
}
MODELS = {role: Path("models") / role / "source.json" for role in ("teacher", "student")}


def run() -> None:
    params.load()
    questions = [(sample, record) for sample in Split(DATA / "test.parquet") for record in sample.records]
    measured = {
        name: {
            variant: read_json(Path("evaluations") / variant / f"{name}.json", "evaluate")
            for variant in summary.VARIANTS
        }
        for name in ("quality", "performance", "predictions")
    }
    predictions = {
        variant: [entry["answer"] for entry in entries] for variant, entries in measured["predictions"].items()
    }
    models = {role: read_json(path, "download-models") for role, path in MODELS.items()}
    histories = {stage: read_json(path, stage) for stage, path in HISTORIES.items()}

    train = Split(DATA / "train.parquet")
    guesses = summary.baselines(train, [record for _, record in questions])
    quality = summary.quality_table(measured["quality"], predictions, guesses)
    performance = summary.performance_table(measured["performance"])
    curves = {stage: summary.training_curve(history) for stage, history in histories.items()}

    with whole_folder(OUTPUT) as folder:
        write_json(folder / "models.json", summary.models_table(models))
        write_json(folder / "quality.json", quality)
        write_json(folder / "performance.json", performance)
        write_json(
            folder / "training.json", {stage: summary.training_summary(rows) for stage, rows in histories.items()}
        )
        plots = folder / "plots"
        plots.mkdir()
        for stage, rows in curves.items():
            (plots / stage).mkdir()
            for split, points in rows.items():
                write_csv(plots / stage / f"{split}.csv", ["step", "loss"], points)
        write_csv(
            plots / "variants.csv",
            ["variant", "exact_match", "latency_ms", "size_mb"],
            summary.points(quality, performance),
        )
        figures.training(curves, plots / "training.png")
        figures.quality(quality, plots / "quality.png")
        figures.quality_against_cost(quality, performance, plots / "quality-against-cost.png")
        figures.by_type(measured["quality"], plots / "by-type.png")
        samples = [train[index] for index in spread(len(train), SAMPLES_SHOWN)]
        # Few colours: it is in git.
        contact_sheet(samples, COLUMNS).quantize(64).save(plots / "contact-sheet.png", optimize=True)
        page.write(
            folder / "report.html",
            quality=quality,
            performance=performance,
            environment=measured["performance"][summary.TEACHER],
            card=read_json(DATA / "card.json", "build-egoqa-dataset"),
            samples=samples,
            parameters=params.PARAMS_FILE.read_text(encoding="utf-8"),
            questions=questions,
            predictions=predictions,
            pictures={
                "Exact match on the test split": plots / "quality.png",
                "Quality against latency and size: up and to the left is better": plots / "quality-against-cost.png",
                "Exact match by question type": plots / "by-type.png",
                "Training and validation loss": plots / "training.png",
            },
        )
    log.info("wrote %s", OUTPUT)


def spread(length: int, count: int) -> range:
    """At most `count` places, evenly over `length`."""
    return range(0, length, max(1, -(-length // count)))


def write_csv(path: Path, columns: list[str], rows: Iterable[Sequence]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


if __name__ == "__main__":
    main(run)
