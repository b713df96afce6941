"""Run the teacher once over the train and validation splits and store its targets for every answer token.

    python -m stages.cache_teacher_targets

The teacher first answers the questions that have no answer; what it computes for an answer are its targets. It then
runs over the samples whose answers are in the data. With `targets.kind: online` no targets are stored, and distill runs
the teacher itself. With `targets.over: classes` the teacher scores each class's wording for every record instead.
Several processes share the batches; what they write does not depend on how many there are.

reads  models/teacher-finetuned, the train and validation splits, the student's tokenizer, `targets` in params.yaml
writes data/teacher-targets (its files: `firstsight.distillation.targets`); without a teacher, left-out.json with the
       reason, and null as answers.json
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import ProcessorMixin

from firstsight.caching.shards import write_shared
from firstsight.core import params, scratch
from firstsight.core.faults import check_disk_space
from firstsight.core.files import fingerprint, fingerprint_files, fingerprint_folder, link_file, whole_folder
from firstsight.core.processes import is_main_process, shared, use_all_gpus
from firstsight.core.stage import log, main
from firstsight.core.variants import leave_out, reason_left_out
from firstsight.distillation.builder import TargetBuilder, write_class_targets
from firstsight.distillation.targets import STAGE, Index, SplitTargetsWriter, write_answers, write_index
from firstsight.distillation.teacher_answers import TeacherAnswers, generate_answers
from firstsight.distillation.vocabulary import shared_vocabulary, vocabulary_fingerprint
from firstsight.models.device import pick_device
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.packing.dataset import PackedDataset, dataset_class
from firstsight.records.parquet import Split

TEACHER, OUTPUT = Path("models/teacher-finetuned"), Path("data/teacher-targets")
SPLITS = {split: Path(f"data/egoqa/{split}.parquet") for split in ("train", "validation")}


@torch.inference_mode()
def run() -> None:
    if reason := reason_left_out(TEACHER):
        leave_out(OUTPUT, reason, beside={"answers.json": None})
        return
    loaded = params.load()
    use_all_gpus(loaded.runtime.device)
    settings = loaded.targets
    processor = load_processor(TEACHER)
    if settings.over == "classes":
        score_classes(processor, loaded)
        return
    shared_tokens = shared_vocabulary(processor.tokenizer, load_processor(Path("models/student")).tokenizer)
    if settings.kind == "topk" and settings.k > shared_tokens.size:
        log.info("targets.k is %d: the logits of all %d shared tokens are stored", settings.k, shared_tokens.size)
    data = {split: Split(path) for split, path in SPLITS.items()}
    device = pick_device(loaded.runtime.device)
    # Large files are read for it: by the main process, for all.
    made_from = {}
    if is_main_process():
        made_from = provenance(settings) | {
            "vocabulary": vocabulary_fingerprint(processor.tokenizer, shared_tokens.common),
            "shared_vocabulary": shared_tokens.common,
            "ends": list(shared_tokens.ends) if shared_tokens.ends else None,
        }
    work = made_from | settings.model_dump() | {"device": device}
    with shared(scratch.kept_folder(STAGE, work)) as scratch_folder:
        needs_teacher = settings.kind != "online" or any(split.unanswered() for split in data.values())
        model = load_model(TEACHER, settings.precision, device) if needs_teacher else None
        answers = generate_answers(model, processor, list(data.values()), settings, scratch_folder)
        splits = {split: PackedDataset(one.answered(answers.texts), processor) for split, one in data.items()}
        encoded = {split: [dataset.answers(one) for one in range(len(dataset))] for split, dataset in splits.items()}
        tokens = {split: count(one) for split, one in encoded.items()}
        built = {"bytes_per_token": 0, "topk_error": {}}
        head = None
        if settings.kind == "online":
            log.info("targets.kind is online: no targets are stored, distill will run the teacher")
        else:
            builder = TargetBuilder(model, settings, shared_tokens)
            head = builder.head
            built = build(
                builder, splits, encoded, answers, settings, scratch_folder, loaded.runtime.data_workers, device
            )
        if is_main_process():
            write(scratch_folder, answers.texts, Index(**made_from, answer_tokens=tokens, **built), head)
    size = sum(path.stat().st_size for path in OUTPUT.iterdir())
    log.info("wrote %s: %s answer tokens, %.1f MB", OUTPUT, f"{sum(tokens.values()):,}", size / 1e6)
    for temperature, kl in built["topk_error"].items():
        log.info("top-%d at T = %s: KL from the exact teacher %.2g per token", settings.k, temperature, kl)


def score_classes(processor: ProcessorMixin, loaded: params.Params) -> None:
    """Write targets over classes: a record counts as one token, which is its class, and the head is an identity."""
    settings, device = loaded.targets, pick_device(loaded.runtime.device)
    packing = dataset_class(processor, over_classes=True)
    data = {split: packing(Split(path), processor) for split, path in SPLITS.items()}
    classes = list(data["train"].split.classes)
    made_from = {}
    if is_main_process():
        made_from = provenance(settings) | {"vocabulary": fingerprint(classes), "classes": classes}
    with shared(scratch.kept_folder(STAGE, made_from | settings.model_dump() | {"device": device})) as kept:
        model, answers = load_model(TEACHER, settings.precision, device, classes=classes), {}
        for split, dataset in data.items():
            answers |= write_class_targets(model, dataset, split, settings, kept, loaded.runtime.data_workers)
        if is_main_process():
            index = Index(
                **made_from,
                shared_vocabulary=len(classes),
                answer_tokens={split: sum(one.split.record_counts()) for split, one in data.items()},
                bytes_per_token=4 * len(classes),
                topk_error={},
            )
            write(kept, answers, index, torch.eye(len(classes)))
    log.info("wrote %s: scores of %d classes; the teacher answered %d records", OUTPUT, len(classes), len(answers))


def write(scratch_folder: Path, answers: dict[str, str], index: Index, head: torch.Tensor | None) -> None:
    """Write the stage's output from the shards in `scratch_folder`."""
    with whole_folder(OUTPUT) as folder:
        for shard in sorted(scratch_folder.glob("*.safetensors")):
            link_file(shard, folder / shard.name)
        write_answers(folder, answers)
        write_index(folder, index, head)


def provenance(settings: params.Targets) -> dict[str, Any]:
    """Return what the targets are made from, as the index records it."""
    return {
        "kind": settings.kind,
        # Over all its files: config, processor and chat template change the teacher's outputs as its weights do.
        "teacher": fingerprint_folder(TEACHER),
        "precision": settings.precision,
        "data": {split: fingerprint_files([path]) for split, path in SPLITS.items()},
    }


def build(
    builder: TargetBuilder,
    splits: dict[str, PackedDataset],
    encoded: dict[str, list[list[list[int]]]],
    answers: TeacherAnswers,
    settings: params.Targets,
    scratch_folder: Path,
    workers: int,
    device: str,
) -> dict[str, Any]:
    """Write the shards that are not yet in `scratch_folder`, all processes together; return what the index records.

    `encoded` has the answer tokens of each record of each sample of a split.
    """
    total = sum(map(count, encoded.values()))
    size = total * builder.bytes_per_token + builder.head_bytes
    log.info("writing about %.1f MB of targets", size / 1e6)
    for place in (OUTPUT, scratch.root()):
        # A twentieth more, for the headers and checksums of shards.
        check_disk_space(place, size * 20 // 19, "free some space, or set targets.kind to topk or online")
    error_sums: Counter[str] = Counter()
    for split, dataset in splits.items():
        compute = partial(
            targets,
            builder=builder,
            dataset=dataset,
            encoded=encoded[split],
            answers=answers,
            workers=workers,
            device=device,
        )
        everything = range(len(dataset))
        batches = [everything[start : start + settings.batch_size] for start in everything[:: settings.batch_size]]
        label = f"{STAGE}: {split}"
        notes = write_shared(SplitTargetsWriter, scratch_folder, split, batches, compute, label, "samples")
        error_sums.update(notes.get("error_sums", {}))
    error = {temperature: sums / total for temperature, sums in error_sums.items()}
    return {"bytes_per_token": builder.bytes_per_token, "topk_error": error}


def targets(
    batches: Sequence[Sequence[int]],
    *,
    builder: TargetBuilder,
    dataset: PackedDataset,
    encoded: list[list[list[int]]],
    answers: TeacherAnswers,
    workers: int,
    device: str,
) -> Iterator[tuple[dict[str, torch.Tensor], list[int], dict[str, float]]]:
    """Yield what `SplitTargetsWriter.write` takes for each of the batches, which are numbers of samples."""
    # The teacher runs over these samples of each batch alone: for the others, it has computed all that is needed.
    to_run = [
        [one for one in batch if not answers.has_states(dataset.split[one].records, encoded[one])] for batch in batches
    ]
    loader = iter(
        DataLoader(dataset, batch_sampler=list(filter(None, to_run)), collate_fn=dataset.collate, num_workers=workers)
    )
    for batch, run_over in zip(batches, to_run, strict=True):
        computed = iter(builder.states(to(next(loader), device)) if run_over else ())
        states = [
            next(computed) if one in run_over else answers.states(dataset.split[one].records).to(device)
            for one in batch
        ]
        made, errors = builder.targets(torch.cat(states))
        tokens = [answer for one in batch for answer in encoded[one]]
        on_cpu = {name: tensor.cpu() for name, tensor in made.items()}
        yield {"answers": torch.tensor(list(chain(*tokens))), **on_cpu}, list(map(len, tokens)), errors


def count(encoded: list[list[list[int]]]) -> int:
    """Count the answer tokens of a split."""
    return sum(len(answer) for sample in encoded for answer in sample)


def to(batch: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    """Move the tensors of a batch to `device`."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


if __name__ == "__main__":
    main(run, ())
