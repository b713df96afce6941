"""Export the teacher as fine-tuned to ONNX graphs with float32 weights, to which the exported students are compared.

    python -m stages.export_teacher

reads  models/teacher-finetuned, the validation split, `export.teacher` and `data.prompt` in params.yaml
writes models/teacher-onnx: a folder like those of export-student; where `export.teacher` is false, only a note that it
       is left out
"""

from pathlib import Path

from firstsight.core import params
from firstsight.core.files import whole_folder, write_json
from firstsight.core.stage import log, main
from firstsight.core.variants import EXPORTED_TEACHER, LEFT_OUT, VARIANTS

SOURCE, VALIDATION = Path("models/teacher-finetuned"), Path("data/egoqa/validation.parquet")


def run() -> None:
    with whole_folder(VARIANTS[EXPORTED_TEACHER].model) as folder:
        loaded = params.load()
        if not loaded.export.teacher:
            write_json(folder / LEFT_OUT, "export.teacher is false")
            log.info("%s is left out: export.teacher is false", EXPORTED_TEACHER)
            return
        # Imported here, because they take seconds, and a teacher that is left out needs none of them.
        from firstsight.export.folder import export_folders, spread_questions
        from firstsight.records.parquet import Split

        questions, classes = spread_questions(VALIDATION), Split(VALIDATION).classes
        layouts = export_folders(SOURCE, {"float32": folder}, questions, (), classes, loaded.data.prompt)
    log.info("%s: %s", EXPORTED_TEACHER, layouts["float32"].summary())


if __name__ == "__main__":
    main(run, ())
