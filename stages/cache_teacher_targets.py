"""Run the teacher once over every answer of the train and validation splits and keep what it knows of each token.

    python -m stages.cache_teacher_targets

reads  models/teacher-finetuned, the train and validation splits, the student's tokenizer, by `targets` in params.yaml
writes data/teacher-targets; for `targets.kind: online` hardly more than its index, and distill runs the teacher
"""

import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from firstsight.core import params, scratch
from firstsight.core.faults import check_disk_space
from firstsight.core.files import fingerprint_files, fingerprint_folder, link_folder, whole_folder
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
        log.info("targets.k is %d: all %d tokens that both models have are kept", settings.k, shared)
    data = {split: Split(path) for split, path in SPLITS.items()}
    device = pick_device(loaded.runtime.device)
    made_from = {
        "kind": settings.kind,
        # Config, processor and chat template decide what the teacher says as its weights do.
        "teacher": fingerprint_folder(TEACHER),
        "precision": settings.precision,
        "data": {split: fingerprint_files([path]) for split, path in SPLITS.items()},
        "vocabulary": vocabulary_fingerprint(processor.tokenizer, shared),
        "shared_vocabulary": shared,
    }
    work = made_from | settings.model_dump() | {"device": device}
    with scratch.kept_folder("cache-teacher-targets", work) as kept:
        unanswered = [question for split in data.values() for question in split.unanswered()]
        runs = settings.kind != "online" or unanswered
        model = load_model(TEACHER, settings.precision, device) if runs else None
        given = generate_answers(model, processor, unanswered, settings, kept)
        splits = {split: PackedDataset(one.answered(given), processor) for split, one in data.items()}
        tokens = {split: dataset.answer_tokens() for split, dataset in splits.items()}
        built = {"bytes_per_token": 0, "topk_error": {}}
        head = None
        if settings.kind == "online":
            log.info("targets.kind is online: no targets are kept, distill will run the teacher")
        else:
            builder = TargetBuilder(model, settings, shared)
            head = builder.head
            built = build(builder, splits, tokens, settings, kept, loaded.runtime.data_workers, device)
        with whole_folder(OUTPUT) as folder:
            link_folder(kept, folder)
            write_index(folder, Index(**made_from, answer_tokens=tokens, **built), head)
    size = sum(path.stat().st_size for path in OUTPUT.iterdir())
    log.info("wrote %s: %s answer tokens, %.1f MB", OUTPUT, f"{sum(tokens.values()):,}", size / 1e6)
    for temperature, kl in built["topk_error"].items():
        log.info("top-%d at T = %s: KL from the exact teacher %.2g a token", settings.k, temperature, kl)


def build(
    builder: TargetBuilder,
    splits: dict[str, PackedDataset],
    tokens: dict[str, int],
    settings: params.Targets,
    kept: Path,
    workers: int,
    device: str,
) -> dict[str, Any]:
    """Write the shards into `kept`, going on after those that are there; what the index says of them."""
    total = sum(tokens.values())
    batches = {split: math.ceil(len(dataset) / settings.batch_size) for split, dataset in splits.items()}
    size = total * builder.bytes_per_token + builder.head_bytes
    log.info("writing about %.1f MB of targets", size / 1e6)
    for place in (OUTPUT, scratch.root()):
        # A twentieth more, for what shards hold besides.
        check_disk_space(place, size * 20 // 19, "free some space, or set targets.kind to topk or online")
    rehearse(builder, splits["train"], settings.batch_size, sum(batches.values()), device)
    error_sums: Counter[str] = Counter()
    for split, dataset in splits.items():
        writer = SplitTargetsWriter(kept, split)
        if writer.batches:
            log.info("%s: going on from batch %d of %d, from %s", split, writer.batches, batches[split], kept)
        rest = Subset(dataset, range(writer.batches * settings.batch_size, len(dataset)))
        loader = DataLoader(rest, settings.batch_size, collate_fn=dataset.collate, num_workers=workers)
        label = f"cache-teacher-targets: {split}"
        for batch in tqdm(loader, desc=label, unit=" batches", initial=writer.batches, total=batches[split]):
            writer.write(*builder.targets(to(batch, device)))
        error_sums.update(writer.close())
    error = {temperature: sums / total for temperature, sums in error_sums.items()}
    return {"bytes_per_token": builder.bytes_per_token, "topk_error": error}


def rehearse(builder: TargetBuilder, dataset: PackedDataset, batch_size: int, batches: int, device: str) -> None:
    """Say how long it will take, from one batch: the second, because the first warms up."""
    batch = to(dataset.collate([dataset[index % len(dataset)] for index in range(batch_size)]), device)
    for _ in range(2):
        started = time.perf_counter()
        builder.targets(batch)
        if device == "cuda":
            torch.cuda.synchronize()
    minutes = (time.perf_counter() - started) * batches / 60
    log.info("%d batches, about %.1f minutes of the teacher", batches, minutes)


def to(batch: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


if __name__ == "__main__":
    main(run, ())
