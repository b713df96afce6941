"""Check that the models and the data fit each other, before anything is trained or cached.

    python -m stages.check_inputs

The vocabularies of teacher and student must agree, and so must the tokens of every answer but its end, unless they are
compared over classes; a text-only model must have positions for every question with its answer, and is not asked about
images.

reads  models/teacher and models/student without their weights, the splits, `targets.max_answer_tokens` and
       `targets.over` in params.yaml
writes data/checked.json, which is the same every time: what depends on it runs after this stage, and not again with it
"""

from collections.abc import Sequence
from pathlib import Path

from firstsight.core import params
from firstsight.core.files import read_json, write_json
from firstsight.core.stage import log, main
from firstsight.core.variants import reason_left_out
from firstsight.records.sample import SPLITS

OUTPUT = Path("data/checked.json")
# The splits that models are trained on.
TAUGHT = ("train", "validation")


def run() -> None:
    settings = params.load().targets
    folders = [folder for role in ("teacher", "student") if not reason_left_out(folder := Path("models") / role)]
    if not fit_by_their_files(folders):
        check(folders, settings)
    write_json(OUTPUT, "models and data fit each other")
    log.info("the models and the data fit each other")


def fit_by_their_files(folders: Sequence[Path]) -> bool:
    """Return whether nothing is left to check: all are vision-language models, with the same tokenizer file."""
    tokenizers = {(folder / "tokenizer.json").read_bytes() for folder in folders}
    configs = [read_json(folder / "config.json", "download-models") for folder in folders]
    return len(tokenizers) == 1 and all("vision_config" in config for config in configs)


def check(folders: Sequence[Path], settings: params.Targets) -> None:
    """Raise UserError unless the models fit each other and the data; the student is the last of the folders.

    The teacher generates answers of at most `settings.max_answer_tokens` tokens where there are none.
    """
    # Imported here, because they take seconds, and most pairs need none of them.
    from firstsight.models.loading import load_processor
    from firstsight.models.text_processor import TextProcessor
    from firstsight.models.tokens import common_tokens
    from firstsight.packing.dataset import OnlineTeacher, PackedDataset
    from firstsight.packing.positions import check_positions, classes_tokens
    from firstsight.records.parquet import Split

    processors = [load_processor(folder) for folder in folders]
    *teacher, student = processors
    over_classes = settings.over == "classes"
    for one in () if over_classes else teacher:
        common_tokens(one.tokenizer, student.tokenizer)
    for name in SPLITS:
        split = Split(Path(f"data/egoqa/{name}.parquet"))
        if name in TAUGHT and split.has_answers() and not over_classes:
            for one in teacher:
                PackedDataset(split.answered({}), student, OnlineTeacher(one)).check_answers()
        if any(isinstance(one, TextProcessor) for one in processors):
            generated = name in TAUGHT and bool(split.unanswered()) and not over_classes
            for one in processors:
                wordings = classes_tokens(one, split.classes)
                for sample in split:
                    check_positions(one, sample, settings.max_answer_tokens if generated else wordings)


if __name__ == "__main__":
    main(run, ())
