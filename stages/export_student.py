"""Export the distilled student to ONNX graphs, which onnxruntime runs without torch, in each format asked for.

    python -m stages.export_student

reads  models/student-distilled, the train split (by whose tokens weights in 4 bits are rounded), the validation split,
       `export.formats`, `export.calibration_samples` and `data.prompt` in params.yaml
writes models/student-{format} for onnx, onnx-int8 and onnx-w4a8: graphs, tokenizer and exported.json, which also holds
       how the graphs' logits and answers compared with the student's, and the error of each matrix in 4 bits; for a
       format that `export.formats` does not list, only a note that it is left out
"""

from contextlib import ExitStack
from pathlib import Path

from firstsight.core import params
from firstsight.core.files import whole_folder, write_json
from firstsight.core.stage import log, main
from firstsight.core.variants import FORMATS, LEFT_OUT, VARIANTS

SOURCE = Path("models/student-distilled")
TRAIN, VALIDATION = Path("data/egoqa/train.parquet"), Path("data/egoqa/validation.parquet")


def run() -> None:
    loaded = params.load()
    settings, formats = loaded.export, loaded.export.formats
    with ExitStack() as outputs:
        folders = {name: outputs.enter_context(whole_folder(VARIANTS[f"student-{name}"].model)) for name in FORMATS}
        for name in FORMATS.keys() - set(formats):
            write_json(folders[name] / LEFT_OUT, f"export.formats is {formats}, without {name}")
        if not formats:
            log.info("the student is not exported: export.formats is empty")
            return
        # Imported here, because they take seconds, and without a format none of them is needed.
        from firstsight.export.folder import export_folders, spread_questions
        from firstsight.records.parquet import Split

        targets = {FORMATS[name]: folders[name] for name in formats}
        calibration = spread_questions(TRAIN, settings.calibration_samples)
        questions, classes = spread_questions(VALIDATION), Split(VALIDATION).classes
        layouts = export_folders(SOURCE, targets, questions, calibration, classes, loaded.data.prompt)
    for name in formats:
        log.info("%s: %s", name, layouts[FORMATS[name]].summary())


if __name__ == "__main__":
    main(run, ())
