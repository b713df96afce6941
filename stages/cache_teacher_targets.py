"""Run the teacher once over the train and validation splits and store its targets for every answer token.

    python -m stages.cache_teacher_targets

The teacher first answers the questions that have no answer. With `targets.kind: online` no targets are stored, and
distill runs the teacher itself.

reads  models/teacher-finetuned, the train and validation splits, the student's tokenizer, `targets` in params.yaml
writes data/teacher-targets (its files: `firstsight.distillation.targets`)
"""

import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from firstsight.core import params, scratch
from firstsight.core.faults import check_disk_space
from firstsight.core.files import fingerprint_files, fingerprint_folder, link_folder, whole_folder
from firstsight.core.progress import progress
from firstsight.core.stage import log, main
from firstsight.distillation.builder import TargetBuilder
from firstsight.distillation.targets import Index, SplitTargetsWriter, write_index
from firstsight.distillation.teacher_answers import generate_answers
from firstsight.distillation.vocabulary import shared_vocabulary, vocabulary_fingerprint
from firstsight.models.loading import load_model, load_processor, pick_device
from firstsight.packing.dataset import PackedDataset
from firstsight.records.parquet import Split

TEACHER, OUTPUT = Path("models/teacher-finetuned"), Path("data/teacher-targets")
SPLITS = {split: Path(f"data/egoqa/{split}.parquet") for split in ("train", "validation")}


@torch.inference_mode()
def run() -> None:
    loaded = params.load()
    settings = loaded.targets
    processor = load_processor(TEACHER)
    shared = shared_vocabulary(processor.tokenizer, load_processor(Path("models/student")).tokenizer)
    if settings.kind == "topk" and settings.k > shared:
        log.info("targets.k is %d: the logits of all %d shared tokens are stored", settings.k, shared)
    data = {split: Split(path) for split, path in SPLITS.items()}
    device = pick_device(loaded.runtime.device)
    made_from = {
        "kind": settings.kind,
        # Over all its files: config, processor and chat template change the teacher's outputs as its weights do.
        "teacher": fingerprint_folder(TEACHER),
        "precision": settings.precision,
        "data": {split: fingerprint_files([path]) for split, path in SPLITS.items()},
        "vocabulary": vocabulary_fingerprint(processor.tokenizer, shared),
        "shared_vocabulary": shared,
    }
    work = made_from | settings.model_dump() | {"device": device}
    with scratch.kept_folder("cache-teacher-targets", work) as scratch_folder:
        unanswered = [question for split in data.values() for question in split.unanswered()]
        needs_teacher = settings.kind != "online" or unanswered
        model = load_model(TEACHER, settings.precision, device) if needs_teacher else None
        answers = generate_answers(model, processor, unanswered, settings, scratch_folder)
        splits = {split: PackedDataset(one.answered(answers), processor) for split, one in data.items()}
        tokens = {split: dataset.answer_tokens() for split, dataset in splits.items()}
        built = {"bytes_per_token": 0, "topk_error": {}}
        head = None
        if settings.kind == "online":
            log.info("targets.kind is online: no targets are stored, distill will run the teacher")
        else:
            builder = TargetBuilder(model, settings, shared)
            head = builder.head
            built = build(builder, splits, tokens, settings, scratch_folder, loaded.runtime.data_workers, device)
        with whole_folder(OUTPUT) as folder:
            link_folder(scratch_folder, folder)
            write_index(folder, Index(**made_from, answer_tokens=tokens, **built), head)
    size = sum(path.stat().st_size for path in OUTPUT.iterdir())
    log.info("wrote %s: %s answer tokens, %.1f MB", OUTPUT, f"{sum(tokens.values()):,}", size / 1e6)
    for temperature, kl in built["topk_error"].items():
        log.info("top-%d at T = %s: KL from the exact teacher %.2g per token", settings.k, temperature, kl)


def build(
    builder: TargetBuilder,
    splits: dict[str, PackedDataset],
    tokens: dict[str, int],
    settings: params.Targets,
    scratch_folder: Path,
    workers: int,
    device: str,
) -> dict[str, Any]:
    """Write the shards that are not yet in `scratch_folder`; return what the index records of them."""
    total = sum(tokens.values())
    batches = {split: math.ceil(len(dataset) / settings.batch_size) for split, dataset in splits.items()}
    size = total * builder.bytes_per_token + builder.head_bytes
    log.info("writing about %.1f MB of targets", size / 1e6)
    for place in (OUTPUT, scratch.root()):
        # A twentieth more, for the headers and checksums of shards.
        check_disk_space(place, size * 20 // 19, "free some space, or set targets.kind to topk or online")
    estimate_time(builder, splits["train"], settings.batch_size, sum(batches.values()), device)
    error_sums: Counter[str] = Counter()
    for split, dataset in splits.items():
        writer = SplitTargetsWriter(scratch_folder, split)
        if writer.batches:
            log.info("%s: resuming after batch %d of %d", split, writer.batches, batches[split])
        remaining = Subset(dataset, range(writer.batches * settings.batch_size, len(dataset)))
        loader = DataLoader(remaining, settings.batch_size, collate_fn=dataset.collate, num_workers=workers)
        label = f"cache-teacher-targets: {split}"
        for batch in progress(loader, desc=label, unit="batches", total=batches[split], initial=writer.batches):
            writer.write(*builder.targets(to(batch, device)))
        error_sums.update(writer.close())
    error = {temperature: sums / total for temperature, sums in error_sums.items()}
    return {"bytes_per_token": builder.bytes_per_token, "topk_error": error}


def estimate_time(builder: TargetBuilder, dataset: PackedDataset, batch_size: int, batches: int, device: str) -> None:
    """Log the time that all batches will take, measured on one batch after a warm-up."""
    batch = to(dataset.collate([dataset[index % len(dataset)] for index in range(batch_size)]), device)
    for _ in range(2):
        started = time.perf_counter()
        builder.targets(batch)
        if device == "cuda":
            torch.cuda.synchronize()
    minutes = (time.perf_counter() - started) * batches / 60
    log.info("%d batches, about %.1f minutes", batches, minutes)


def to(batch: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    """Move the tensors of a batch to `device`."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


if __name__ == "__main__":
    main(run, ())
