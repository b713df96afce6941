"""Train the control: the student as in distill, for as many optimizer steps, but on answers alone, without a teacher.

    python -m stages.finetune_student

What the distilled student answers better than this one is what distilling added. With `control.answers: labels` it
learns from the answers that the data has; with `teacher` also from the answers that the teacher gave to the other
questions, which tells the worth of the teacher's distributions from that of more data. Where `models.teacher` is null,
this is all that is trained, whatever `control` says, and what is quantized.

reads  models/student, the train and validation splits, the teacher's answers in data/teacher-targets, `control`,
       `targets.over`, and `train` in params.yaml without temperature, alpha and divergence; data/visual-tokens as in
       distill
writes models/student-finetuned: a complete model folder, adapters merged, and history.json; if the control is left
       out, left-out.json with the reason instead. trained-alone.json in it is what quantize-student depends on: without
       a teacher the model's fingerprint, otherwise null, so that another control does not run it again
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

from firstsight.core import params
from firstsight.core.files import fingerprint_files, fingerprint_folder, read_json, whole_folder, write_json
from firstsight.core.processes import shared, use_all_gpus
from firstsight.core.scratch import kept_folder
from firstsight.core.stage import log, main
from firstsight.core.variants import CONTROL, TRAINED_ALONE, VARIANTS, leave_out
from firstsight.records.parquet import Split

STUDENT, TARGETS, OUTPUT = Path("models/student"), Path("data/teacher-targets"), VARIANTS[CONTROL].model
VISUAL_TOKENS = Path("data/visual-tokens")
SPLITS = {split: Path(f"data/egoqa/{split}.parquet") for split in ("train", "validation")}
# Of `train`, what matters to the loss of a distillation alone.
DISTILLATION_ONLY = {"temperature", "alpha", "divergence", "jsd_beta"}


def run() -> None:
    loaded = params.load()
    splits = {name: Split(path) for name, path in SPLITS.items()}
    alone = read_json(TARGETS / "answers.json", "cache-teacher-targets") is None
    reason = None if alone else left_out(loaded.control, splits)
    if reason is None:
        train_control(loaded, splits, alone=alone)
        log.info("wrote %s", OUTPUT)
        return
    leave_out(OUTPUT, reason, beside={TRAINED_ALONE: None})


def train_control(loaded: params.Params, splits: dict[str, Split], *, alone: bool) -> None:
    """Train the control, or the student where it is `alone`, without a teacher, and write it with its history."""
    use_all_gpus(loaded.runtime.device)
    # Imported here, because they take seconds, and a control that is left out needs none of them.
    from accelerate import PartialState

    from firstsight.caching.visual_tokens import SplitVisualTokens, read_visual_index
    from firstsight.distillation.targets import read_answers
    from firstsight.models.device import pick_device, training_precision
    from firstsight.models.processors import load_processor
    from firstsight.packing.dataset import dataset_class
    from firstsight.training.adapters import FINAL, TrainableModel
    from firstsight.training.distillation_model import DistillationModel
    from firstsight.training.fit import total_steps, train

    device = pick_device(loaded.runtime.device)
    settings, student, visual = loaded.train, fingerprint_folder(STUDENT), None
    if settings.caches_visual_tokens:
        visual = read_visual_index(VISUAL_TOKENS, student, training_precision(settings.method, device))
    given = read_answers(TARGETS)
    learnt_from = given if loaded.control.answers == "teacher" else {}
    # As many samples an epoch as distill has, so that steps, learning rates and evaluations are the same.
    samples = splits["train"].answered(learnt_from).repeated_to(len(splits["train"].answered(given)))
    processor = load_processor(STUDENT)
    data = {name: fingerprint_files([path]) for name, path in SPLITS.items()}
    seen = {name: SplitVisualTokens(VISUAL_TOKENS, name, visual, data[name]) if visual else None for name in SPLITS}
    classes = len(samples.classes) if loaded.targets.over == "classes" else None
    packing = dataset_class(processor, over_classes=classes is not None)
    train_set = packing(samples, processor, visual=seen["train"])
    validation = splits["validation"].answered(learnt_from)
    validation_set = packing(validation, processor, visual=seen["validation"])
    steps = total_steps(len(train_set), settings)
    trainable = TrainableModel(
        STUDENT, settings, device, steps, classes=samples.classes, without_tower=visual is not None
    )
    work = {
        "settings": settings.model_dump(exclude=DISTILLATION_ONLY),
        "student": student,
        "data": data,
        "visual_tokens": asdict(visual) if visual else None,
        "answers": learnt_from,
        "classes": classes,
        "samples": len(train_set),
        "device": device,
        "processes": PartialState().num_processes,
    }
    main_process = PartialState().is_main_process
    with shared(kept_folder("finetune-student", work)) as scratch, shared(whole_folder(OUTPUT)) as folder:
        history = train(
            DistillationModel(trainable.model, classes=classes, regularisation=trainable.regularisation),
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
            write_json(folder / TRAINED_ALONE, fingerprint_folder(folder) if alone else None)


def left_out(control: params.Control, splits: dict[str, Split]) -> str | None:
    """Return the reason why the control is not trained, or None if it is."""
    if not control.enabled:
        return "control.enabled is false"
    if control.answers == "labels":
        for name, split in splits.items():
            if not split.has_answers():
                return f"the {name} split has no question with an answer; set control.answers to teacher"
    return None


if __name__ == "__main__":
    main(run, ())
