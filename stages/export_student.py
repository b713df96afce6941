"""Export the distilled student to ONNX graphs, which onnxruntime runs without torch, with weights of one precision.

    python -m stages.export_student onnx        (or onnx-int8, onnx-w4a8)

reads  models/student-distilled, the validation split, `export` in params.yaml
writes models/student-{format}: graphs, tokenizer and exported.json, which also holds how the graphs' logits and answers
       compared with the student's; for a format that `export.formats` does not list, only a note that it is left out
"""

from pathlib import Path

from firstsight.core import params
from firstsight.core.files import whole_folder, write_json
from firstsight.core.stage import log, main
from firstsight.core.variants import FORMATS, LEFT_OUT, VARIANTS

SOURCE, VALIDATION = Path("models/student-distilled"), Path("data/egoqa/validation.parquet")


def run(name: str) -> None:
    settings = params.load().export
    with whole_folder(VARIANTS[f"student-{name}"].model) as folder:
        if name not in settings.formats:
            write_json(folder / LEFT_OUT, f"export.formats is {settings.formats}, without {name}")
            log.info("%s is left out: export.formats is %s", name, settings.formats)
            return
        # Imported here, because they take seconds, and a format that is left out needs none of them.
        from firstsight.export.folder import compared_questions, export_folder

        layout = export_folder(SOURCE, folder, FORMATS[name], compared_questions(VALIDATION))
    log.info("%s: %s", name, layout.summary())


if __name__ == "__main__":
    main(run, FORMATS)
