"""Check that the models and the data fit each other, before anything is trained or cached.

    python -m stages.check_inputs

The vocabularies of teacher and student must agree, and so must the tokens of every answer but its end, unless they are
compared over classes; a text-only model must have positions for every question with its answer, and is not asked about
images. An encoder can be compared over classes alone; a teacher that is one and is not fine-tuned must have a head for
them. A model that is to be exported must be of an architecture that is, and OpenVINO installed where exports are
measured in it. Texts are read by language models in PyTorch alone; it is counted here how many are longer than
`data.max_tokens`, by the student's tokenizer.

reads  models/teacher and models/student without their weights, the splits, and in params.yaml the exports and what is
       asked of teacher and student
writes data/checked.json: of texts, what was counted of the train and validation splits; otherwise the same every time,
       so that what depends on it runs after this stage, and not again with it
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firstsight.core import params
from firstsight.core.engines import check_installed
from firstsight.core.errors import UserError
from firstsight.core.files import read_json, write_json
from firstsight.core.stage import log, main
from firstsight.core.variants import METHODS, reason_left_out
from firstsight.records.sample import SPLITS, Text

if TYPE_CHECKING:
    from firstsight.records.parquet import Split

OUTPUT, CARD = Path("data/checked.json"), Path("data/egoqa/card.json")
# The splits that models are trained on.
TAUGHT = ("train", "validation")


def run() -> None:
    loaded = params.load()
    # The exports' own stages look for onnxruntime, which is part of the environment.
    if loaded.evaluate.engine != "onnxruntime" and (loaded.export.formats or loaded.export.teacher):
        check_installed(loaded.evaluate.engine)
    folders = [folder for role in ("teacher", "student") if not reason_left_out(folder := Path("models") / role)]
    for folder in folders:
        check_int4(folder, quantizing(folder.name, loaded))
    counts = {}
    if not fit_by_their_files(folders) or reads_texts():
        counts = check(folders, loaded)
    write_json(OUTPUT, {"texts": counts} if counts else "models and data fit each other")
    for split, count in counts.items():
        log.info(
            "%s: %d texts of %d tokens; %d of them are cut by data.max_tokens, by %d tokens in all",
            *(split, count["texts"], count["tokens"], count["texts_cut"], count["tokens_cut"]),
        )
    log.info("the models and the data fit each other")


def fit_by_their_files(folders: Sequence[Path]) -> bool:
    """Return whether nothing is left to check: all are vision-language models, with the same tokenizer file."""
    tokenizers = {(folder / "tokenizer.json").read_bytes() for folder in folders}
    configs = [read_json(folder / "config.json", "download-models") for folder in folders]
    return len(tokenizers) == 1 and all("vision_config" in config for config in configs)


def splits() -> dict[str, "Split"]:
    """Return the splits by name."""
    from firstsight.records.parquet import Split  # takes a while to import

    return {name: Split(Path(f"data/egoqa/{name}.parquet")) for name in SPLITS}


def reads_texts() -> bool:
    """Return whether the records are texts: all are of one kind, and rendered scenes are always asked about."""
    source = read_json(CARD, "build-egoqa-dataset")["source"] if CARD.exists() else None
    return source != "synthetic" and isinstance(splits()["train"][0].records[0], Text)


def check(folders: Sequence[Path], loaded: params.Params) -> dict[str, dict[str, int]]:
    """Check that the models fit each other and the data; the student is the last of the folders.

    Returns what is counted of texts, by split: nothing where there are none.

    Raises:
        UserError: they do not fit.
    """
    # Imported here, because they take seconds, and most pairs need none of them.
    from firstsight.models.exportable import check_architecture
    from firstsight.models.processors import load_processor
    from firstsight.models.text_processor import EncoderProcessor, TextProcessor
    from firstsight.models.tokens import common_tokens
    from firstsight.packing.dataset import OnlineTeacher, PackedDataset
    from firstsight.packing.positions import check_positions, classes_tokens

    settings, finetuned = loaded.targets, loaded.finetune_teacher.enabled
    processors = [load_processor(folder) for folder in folders]
    *teacher, student = processors
    over_classes, texts = settings.over == "classes", reads_texts()
    if texts:
        check_reading([isinstance(one, TextProcessor) for one in processors], folders, loaded.export)
    for folder, one in zip(folders, processors, strict=True):
        role = "student" if one is student else "teacher"
        if isinstance(one, EncoderProcessor):
            check_encoder(folder, over_classes=over_classes, needs_head=role == "teacher" and not finetuned)
            check_not_quantized(folder, quantizing(role, loaded))
            if role == "teacher" and settings.class_scores != "sum":
                raise UserError(
                    f"targets.class_scores: expected sum, because {folder} is an encoder, whose scores are the logits "
                    f"of its head, found {settings.class_scores}; set it so"
                )
    exported = {Path("models/student"): loaded.export.formats, Path("models/teacher"): loaded.export.teacher}
    for folder in folders:
        if exported[folder]:
            check_architecture(folder)
    for one in () if over_classes else teacher:
        common_tokens(one.tokenizer, student.tokenizer)
    for name, split in splits().items():
        if name in TAUGHT and split.has_answers() and not over_classes:
            for one in teacher:
                PackedDataset(split.answered({}), student, OnlineTeacher(one)).check_answers()
        if any(isinstance(one, TextProcessor | EncoderProcessor) for one in processors):
            generated = name in TAUGHT and bool(split.unanswered()) and not over_classes
            for one in processors:
                wordings = classes_tokens(one, split.classes)
                calibrates = settings.class_scores == "calibrated" and one is not student
                for sample in chain(split.content_free if calibrates else (), split):
                    check_positions(one, sample, settings.max_answer_tokens if generated else wordings)
    return {name: counted(split, student) for name, split in splits().items() if name in TAUGHT} if texts else {}


def check_encoder(folder: Path, *, over_classes: bool, needs_head: bool) -> None:
    """Raise UserError unless the encoder in `folder` is used for classes, and has a head for them if it needs one."""
    from firstsight.models.heads import has_head

    if not over_classes:
        raise UserError(
            f"{folder}: expected a model that answers in text, because targets.over is tokens, found an encoder, which "
            "tells classes apart; set targets.over to classes, or take a causal language model"
        )
    classes = splits()["train"].classes
    if needs_head and not has_head(folder, classes):
        raise UserError(
            f"{folder}: expected a classification head for the {len(classes)} classes {', '.join(classes)[:120]}, in "
            "this order (id2label in config.json), because finetune_teacher.enabled is false, found another or none; "
            "set it to true, or take a checkpoint that was fine-tuned for these classes"
        )


def quantizing(role: str, loaded: params.Params) -> dict[str, Any]:
    """Return the settings, by key, by which params.yaml asks for the role's model quantized."""
    methods = {"targets.precision": loaded.targets.precision, "finetune_teacher.method": loaded.finetune_teacher.method}
    if not loaded.finetune_teacher.enabled:
        methods.pop("finetune_teacher.method")
    if role == "student":
        methods = {"train.method": loaded.train.method}
    methods["evaluate.precision"] = loaded.evaluate.precision
    found: dict[str, Any] = {key: value for key, value in methods.items() if value in (*METHODS, "qlora")}
    if role == "teacher" and loaded.evaluate.teacher_methods:
        found["evaluate.teacher_methods"] = loaded.evaluate.teacher_methods
    return found


def check_not_quantized(folder: Path, asked: dict[str, Any]) -> None:
    """Raise UserError if an encoder is to be quantized, by one of the settings that `quantizing` returns."""
    for key, value in asked.items():
        instead = {"qlora": "lora"}.get(value, "auto") if isinstance(value, str) else "[]"
        raise UserError(
            f"{key}: expected {instead}, because {folder} is an encoder, of which no part is quantized, found {value}; "
            "set it so"
        )


def check_int4(folder: Path, asked: dict[str, Any]) -> None:
    """Raise UserError if a setting that `quantizing` returned asks for int4 of a model that it does not round."""
    keys = [key for key, value in asked.items() if "int4" in value]
    if not keys:
        return
    from firstsight.models.architecture import is_encoder  # as in `check`
    from firstsight.models.loading import int4_misfit

    encoder = is_encoder(read_json(folder / "config.json", "download-models")["model_type"])  # refused as such
    if not encoder and (reason := int4_misfit(folder)):
        raise UserError(f"{keys[0]}: {folder}: {reason}; leave int4 out")


def check_reading(text_alone: Sequence[bool], folders: Sequence[Path], export: params.Export) -> None:
    """Raise UserError unless all models read text alone, as those in `folders` do or not, and none is exported."""
    for alone, folder in zip(text_alone, folders, strict=True):
        if not alone:
            raise UserError(
                f"{folder}: expected a language model, because the records are texts, found a vision-language model or "
                "an encoder; take a language model, or ask questions"
            )
    if export.formats or export.teacher:
        found = f"{export.formats} and {str(export.teacher).lower()}"
        raise UserError(
            "export.formats and export.teacher: expected [] and false, because the records are texts, whose "
            f"probabilities an exported model does not return, found {found}; set them so"
        )


def counted(split: "Split", processor: Any) -> dict[str, int]:
    """Count a split's texts and their tokens, end tokens included, and what `data.max_tokens` cuts of them."""
    from firstsight.packing.pack import encode_answers  # as in `check`

    kept, whole = [], []
    for sample in split:
        texts = [one for one in sample.records if isinstance(one, Text)]
        kept += map(len, encode_answers(processor, texts))
        whole += map(len, encode_answers(processor, [replace(one, max_tokens=None) for one in texts]))
    return {
        "texts": len(kept),
        "tokens": sum(kept),
        "texts_cut": sum(short < long for short, long in zip(kept, whole, strict=True)),
        "tokens_cut": sum(whole) - sum(kept),
    }


if __name__ == "__main__":
    main(run, ())
