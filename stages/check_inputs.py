"""Check that the models and the data fit each other, before anything is trained or cached.

    python -m stages.check_inputs

The vocabularies of teacher and student must agree, and so must the tokens of every answer but its end, unless they are
compared over classes; a text-only model must have positions for every question with its answer, and is not asked about
images. An encoder can be compared over classes alone; a teacher that is one and is not fine-tuned must have a head for
them.

reads  models/teacher and models/student without their weights, the splits, `targets.max_answer_tokens`, `targets.over`
       and `finetune_teacher.enabled` in params.yaml
writes data/checked.json, which is the same every time: what depends on it runs after this stage, and not again with it
"""

from collections.abc import Sequence
from pathlib import Path

from firstsight.core import params
from firstsight.core.errors import UserError
from firstsight.core.files import read_json, write_json
from firstsight.core.stage import log, main
from firstsight.core.variants import reason_left_out
from firstsight.records.sample import SPLITS

OUTPUT = Path("data/checked.json")
# The splits that models are trained on.
TAUGHT = ("train", "validation")


def run() -> None:
    loaded = params.load()
    folders = [folder for role in ("teacher", "student") if not reason_left_out(folder := Path("models") / role)]
    if not fit_by_their_files(folders):
        check(folders, loaded.targets, finetuned=loaded.finetune_teacher.enabled)
    write_json(OUTPUT, "models and data fit each other")
    log.info("the models and the data fit each other")


def fit_by_their_files(folders: Sequence[Path]) -> bool:
    """Return whether nothing is left to check: all are vision-language models, with the same tokenizer file."""
    tokenizers = {(folder / "tokenizer.json").read_bytes() for folder in folders}
    configs = [read_json(folder / "config.json", "download-models") for folder in folders]
    return len(tokenizers) == 1 and all("vision_config" in config for config in configs)


def check(folders: Sequence[Path], settings: params.Targets, *, finetuned: bool) -> None:
    """Raise UserError unless the models fit each other and the data; the student is the last of the folders.

    The teacher generates answers of at most `settings.max_answer_tokens` tokens where there are none; `finetuned` says
    whether it is trained before.
    """
    # Imported here, because they take seconds, and most pairs need none of them.
    from firstsight.models.loading import load_processor
    from firstsight.models.text_processor import EncoderProcessor, TextProcessor
    from firstsight.models.tokens import common_tokens
    from firstsight.packing.dataset import OnlineTeacher, PackedDataset
    from firstsight.packing.positions import check_positions, classes_tokens
    from firstsight.records.parquet import Split

    processors = [load_processor(folder) for folder in folders]
    *teacher, student = processors
    over_classes = settings.over == "classes"
    for folder, one in zip(folders, processors, strict=True):
        if isinstance(one, EncoderProcessor):
            check_encoder(folder, over_classes=over_classes, needs_head=one is not student and not finetuned)
    for one in () if over_classes else teacher:
        common_tokens(one.tokenizer, student.tokenizer)
    for name in SPLITS:
        split = Split(Path(f"data/egoqa/{name}.parquet"))
        if name in TAUGHT and split.has_answers() and not over_classes:
            for one in teacher:
                PackedDataset(split.answered({}), student, OnlineTeacher(one)).check_answers()
        if any(isinstance(one, TextProcessor | EncoderProcessor) for one in processors):
            generated = name in TAUGHT and bool(split.unanswered()) and not over_classes
            for one in processors:
                wordings = classes_tokens(one, split.classes)
                for sample in split:
                    check_positions(one, sample, settings.max_answer_tokens if generated else wordings)


def check_encoder(folder: Path, *, over_classes: bool, needs_head: bool) -> None:
    """Raise UserError unless the encoder in `folder` is used for classes, and has a head for them if it needs one."""
    from firstsight.models.loading import has_head
    from firstsight.records.parquet import Split

    if not over_classes:
        raise UserError(
            f"{folder}: expected a model that answers in text, because targets.over is tokens, found an encoder, which "
            "tells classes apart; set targets.over to classes, or take a causal language model"
        )
    classes = Split(Path("data/egoqa/train.parquet")).classes
    if needs_head and not has_head(folder, classes):
        raise UserError(
            f"{folder}: expected a classification head for the {len(classes)} classes {', '.join(classes)[:120]}, in "
            "this order (id2label in config.json), because finetune_teacher.enabled is false, found another or none; "
            "set it to true, or take a checkpoint that was fine-tuned for these classes"
        )


if __name__ == "__main__":
    main(run, ())
