"""Distil: train the student on the teacher's targets and on the answers themselves.

    python -m stages.distill

reads  models/student, data/teacher-targets, the train and validation splits, `train` in params.yaml; for online targets
       also models/teacher-finetuned; data/visual-tokens if the vision tower is frozen and its outputs are cached
writes models/student-distilled: a complete model folder, adapters merged, and history.json; with `train.keep_final`,
       the weights of the last step in final/; without a teacher,
       left-out.json with the reason and an empty history
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

from accelerate import PartialState
from transformers import ProcessorMixin

from firstsight.caching.visual_tokens import SplitVisualTokens, VisualIndex, read_visual_index
from firstsight.core import params
from firstsight.core.files import fingerprint_files, fingerprint_folder, whole_folder, write_json
from firstsight.core.processes import shared, use_all_gpus
from firstsight.core.scratch import kept_folder
from firstsight.core.stage import log, main
from firstsight.core.variants import leave_out, reason_left_out
from firstsight.distillation.targets import (
    SplitTargets,
    check_files,
    check_vocabulary,
    read_answers,
    read_head,
    read_index,
)
from firstsight.models.device import pick_device, training_precision
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.packing.dataset import OnlineTeacher, PackedDataset, dataset_class
from firstsight.packing.output_head import head_weight
from firstsight.records.parquet import Split
from firstsight.training.adapters import FINAL, TrainableModel
from firstsight.training.distillation_model import DistillationModel
from firstsight.training.fit import total_steps, train

STUDENT, TEACHER, TARGETS = Path("models/student"), Path("models/teacher-finetuned"), Path("data/teacher-targets")
VISUAL_TOKENS = Path("data/visual-tokens")
OUTPUT = Path("models/student-distilled")


def run() -> None:
    loaded = params.load()
    if reason := reason_left_out(TARGETS):
        leave_out(OUTPUT, reason, beside={"history.json": []})
        return
    use_all_gpus(loaded.runtime.device)
    settings = loaded.train
    processor = load_processor(STUDENT)
    index = read_index(TARGETS)
    if not index.classes:
        check_vocabulary(TARGETS, processor.tokenizer)
    check_files(TARGETS, index)
    online = index.kind == "online"
    device = pick_device(loaded.runtime.device)
    student, visual = fingerprint_folder(STUDENT), None
    if settings.caches_visual_tokens:
        visual = read_visual_index(VISUAL_TOKENS, student, training_precision(settings.method, device))
    train_set, validation_set = (
        dataset(name, processor, load_processor(TEACHER) if online else None, visual, over_classes=bool(index.classes))
        for name in ("train", "validation")
    )
    if not index.classes:
        for split in (train_set, validation_set):
            split.check_answers()
    steps = total_steps(len(train_set), settings)
    trainable = TrainableModel(
        STUDENT, settings, device, steps, classes=index.classes or (), without_tower=visual is not None
    )
    teacher = load_model(TEACHER, index.precision, device).requires_grad_(False) if online else None
    head = index.tokens.of_teacher(head_weight(teacher)) if online else read_head(TARGETS, device)
    model = DistillationModel(
        trainable.model,
        settings,
        teacher_head=head,
        teacher=teacher,
        vocabulary=index.tokens,
        classes=len(index.classes) if index.classes else None,
        regularisation=trainable.regularisation,
    )
    inputs = [TARGETS, *([TEACHER] if online else [])]
    work = {
        "settings": settings.model_dump(),
        "inputs": {str(one): fingerprint_folder(one) for one in inputs} | {str(STUDENT): student},
        "visual_tokens": asdict(visual) if visual else None,
        "targets": asdict(index) | {"answers": read_answers(TARGETS)},
        "device": device,
        "processes": PartialState().num_processes,
    }
    main_process = PartialState().is_main_process
    with shared(kept_folder("distill", work)) as scratch, shared(whole_folder(OUTPUT)) as folder:
        history = train(
            model,
            train_set,
            validation_set,
            settings,
            scratch,
            data_workers=loaded.runtime.data_workers,
            device=device,
            early_stopping_epochs=settings.early_stopping_epochs,
            best=settings.best,
            save_final=partial(trainable.save_final, folder / FINAL) if settings.keep_final and main_process else None,
            trainable=trainable,
        )
        if main_process:
            trainable.save_merged(folder)
            processor.save_pretrained(folder)
            if settings.keep_final:
                processor.save_pretrained(folder / FINAL)
            write_json(folder / "history.json", history)
    log.info("wrote %s", OUTPUT)


def dataset(
    split: str,
    processor: ProcessorMixin,
    teacher_processor: ProcessorMixin | None,
    visual: VisualIndex | None,
    *,
    over_classes: bool,
) -> PackedDataset:
    """Return a split with its stored targets or, with a teacher's processor, with the teacher's inputs.

    With an index of visual tokens, it has these in the place of pixels. For targets `over_classes`, each prompt is
    packed with all classes.
    """
    path = Path(f"data/egoqa/{split}.parquet")
    samples, data = Split(path).answered(read_answers(TARGETS)), fingerprint_files([path])
    seen = SplitVisualTokens(VISUAL_TOKENS, split, visual, data) if visual else None
    if teacher_processor is not None:
        return PackedDataset(samples, processor, OnlineTeacher(teacher_processor), seen)
    packing = dataset_class(processor, over_classes=over_classes)
    return packing(samples, processor, SplitTargets(TARGETS, split, data), seen)


if __name__ == "__main__":
    main(run, ())
