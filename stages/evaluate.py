"""Measure one variant: its answers to the test questions, how good they are, and how large and fast the model is.

    python -m stages.evaluate student-distilled

reads  the variant's model folder and data/egoqa/test.parquet
writes evaluations/{variant}/{predictions,quality,performance}.json
"""

import sys
import time
from pathlib import Path

from tqdm import tqdm

from firstsight.core import params
from firstsight.core.files import whole_folder, write_json
from firstsight.core.stage import log, main
from firstsight.data.records import Split
from firstsight.evaluation import profiling
from firstsight.evaluation.answering import answers
from firstsight.evaluation.quality import summarise
from firstsight.models.loading import load_model, load_processor, pick_device

MODELS = {
    "teacher": Path("models/teacher-finetuned"),
    "student": Path("models/student"),
    "student-distilled": Path("models/student-distilled"),
    "student-quantized": Path("models/student-quantized"),
}


def run() -> None:
    variant = sys.argv[1]
    loaded = params.load()
    settings = loaded.evaluate
    test = Split(Path("data/egoqa/test.parquet"))
    questions = [(sample, record) for sample in test for record in sample.records]
    device = pick_device(loaded.runtime.device)

    processor = load_processor(MODELS[variant])
    started = time.perf_counter()
    model = load_model(MODELS[variant], settings.precision, device)
    load_seconds = time.perf_counter() - started

    asked = answers(model, processor, questions, settings.batch_size, settings.max_new_tokens)
    predicted = list(tqdm(asked, total=len(questions), desc=f"evaluate {variant}", unit=" questions"))
    records = [record for _, record in questions]
    quality = summarise(records, predicted, settings.bootstrap_samples, settings.seed)
    performance = {
        "parameters": profiling.parameter_count(model),
        "disk_bytes": profiling.folder_bytes(MODELS[variant]),
        "weights_bytes": profiling.weights_bytes(model),
        "load_seconds": load_seconds,
        **profiling.measure_speed(model, processor, questions, settings.latency_runs, settings.latency_new_tokens),
        **profiling.environment(device),
    }
    with whole_folder(Path("evaluations") / variant) as folder:
        write_json(
            folder / "predictions.json",
            [{"id": record.id, "answer": answer} for record, answer in zip(records, predicted, strict=True)],
        )
        write_json(folder / "quality.json", quality)
        write_json(folder / "performance.json", performance)
    log.info(
        "%s: exact match %.3f, F1 %.3f, %.1f ms an answer",
        variant,
        quality["exact_match"],
        quality["f1"],
        performance["latency_ms_p50"],
    )


if __name__ == "__main__":
    main(run)
