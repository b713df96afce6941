"""Distil: train the student on the teacher's cached knowledge of every answer token and on the answers themselves.

    accelerate launch -m stages.distill

reads  models/student, data/teacher-targets and the train and validation splits, by `train` in params.yaml
writes models/student-distilled, with its training history
"""

from pathlib import Path

from firstsight.core import params
from firstsight.core.files import fingerprint_files, scratch_folder, whole_folder, write_json
from firstsight.core.stage import log, main
from firstsight.data.dataset import PackedDataset
from firstsight.data.records import Split
from firstsight.distillation.targets import SplitTargets, check_vocabulary, read_head
from firstsight.distillation.trainer import DistillationModel, train
from firstsight.models.loading import load_model, load_processor, pick_device

STUDENT, TARGETS, OUTPUT = Path("models/student"), Path("data/teacher-targets"), Path("models/student-distilled")


def run() -> None:
    loaded = params.load()
    settings, runtime = loaded.train, loaded.runtime
    processor = load_processor(STUDENT)
    check_vocabulary(TARGETS, processor.tokenizer)
    train_set, validation_set = (dataset(split, processor) for split in ("train", "validation"))
    device = pick_device(runtime.device)
    student = load_model(STUDENT, "float32", device)
    model = DistillationModel(student, read_head(TARGETS).to(device), settings.temperature, settings.alpha)
    with whole_folder(OUTPUT) as folder, scratch_folder("distill") as scratch:
        history = train(
            model,
            train_set,
            validation_set,
            settings,
            scratch,
            data_workers=runtime.data_workers,
            device=device,
            early_stopping_epochs=settings.early_stopping_epochs,
        )
        student.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_json(folder / "history.json", history)
    log.info("wrote %s", OUTPUT)


def dataset(split: str, processor) -> PackedDataset:
    """A split with the teacher's targets, which must have been made from this very file."""
    path = Path(f"data/egoqa/{split}.parquet")
    return PackedDataset(Split(path), processor, SplitTargets(TARGETS, split, fingerprint_files([path])))


if __name__ == "__main__":
    main(run)
