"""Fine-tune the teacher on the train split, or link it unchanged if `finetune_teacher.enabled` is false.

    python -m stages.finetune_teacher

reads  models/teacher, the train and validation splits, `finetune_teacher` in params.yaml
writes models/teacher-finetuned: a complete model folder, or for adapter methods models/teacher's files and the adapter
       in adapter/; and history.json; without a teacher, left-out.json with the reason and an empty history
"""

from pathlib import Path

from firstsight.core import params
from firstsight.core.files import fingerprint_files, fingerprint_folder, link_folder, whole_folder, write_json
from firstsight.core.processes import is_main_process, shared, use_all_gpus
from firstsight.core.scratch import kept_folder
from firstsight.core.stage import log, main
from firstsight.core.variants import leave_out, reason_left_out

TEACHER, OUTPUT = Path("models/teacher"), Path("models/teacher-finetuned")
SPLITS = {split: Path(f"data/egoqa/{split}.parquet") for split in ("train", "validation")}


def run() -> None:
    loaded = params.load()
    if reason := reason_left_out(TEACHER):
        leave_out(OUTPUT, reason, beside={"history.json": []})
        return
    if loaded.finetune_teacher.enabled:
        train_teacher(loaded.finetune_teacher, loaded.runtime)
        log.info("wrote %s", OUTPUT)
        return
    if is_main_process():
        with whole_folder(OUTPUT) as folder:
            link_folder(TEACHER, folder)
            write_json(folder / "history.json", [])
    log.info("finetune_teacher.enabled is false: %s is %s unchanged", OUTPUT, TEACHER)


def train_teacher(settings: params.FinetuneTeacher, runtime: params.Runtime) -> None:
    """Train the teacher and write it, with its history."""
    use_all_gpus(runtime.device)
    # Imported here, because they take seconds, and a teacher that stays as it is needs none of them.
    from accelerate import PartialState

    from firstsight.models.device import pick_device
    from firstsight.models.processors import load_processor
    from firstsight.models.text_processor import EncoderProcessor
    from firstsight.packing.dataset import dataset_class
    from firstsight.records.parquet import Split
    from firstsight.training.adapters import TrainableModel
    from firstsight.training.distillation_model import DistillationModel
    from firstsight.training.fit import total_steps, train

    device = pick_device(runtime.device)
    processor = load_processor(TEACHER)
    # An encoder has nothing but classes; a language model is taught the wording of the right one alone.
    classes = Split(SPLITS["train"]).classes if isinstance(processor, EncoderProcessor) else ()
    packing = dataset_class(processor, over_classes=False)
    train_set, validation_set = (packing(Split(path).answered({}), processor) for path in SPLITS.values())
    trainable = TrainableModel(TEACHER, settings, device, total_steps(len(train_set), settings), classes=classes)
    work = {
        "settings": settings.model_dump(),
        "teacher": fingerprint_folder(TEACHER),
        "data": fingerprint_files(list(SPLITS.values())),
        "device": device,
        "processes": PartialState().num_processes,
    }
    with shared(kept_folder("finetune-teacher", work)) as scratch, shared(whole_folder(OUTPUT)) as folder:
        history = train(
            DistillationModel(trainable.model, classes=len(classes) or None, regularisation=trainable.regularisation),
            train_set,
            validation_set,
            settings,
            scratch,
            data_workers=runtime.data_workers,
            device=device,
            trainable=trainable,
        )
        if PartialState().is_main_process:
            trainable.save(folder)
            processor.save_pretrained(folder)
            write_json(folder / "history.json", history)


if __name__ == "__main__":
    main(run, ())
