"""Run the student's frozen vision tower once over every image and video of the train and validation splits.

    python -m stages.cache_visual_tokens

distill and finetune-student then train on its outputs, the visual tokens, and neither run the tower nor process pixels.
Several processes share the samples; what they write does not depend on how many there are.

reads  models/student, the train and validation splits, `method`, `train_vision` and `visual_tokens` of `train` in
       params.yaml
writes data/visual-tokens (its files: `firstsight.caching.visual_tokens`); if the tower is trained, or visual tokens are
       computed in every epoch, left-out.json with the reason instead
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firstsight.core import params, scratch
from firstsight.core.faults import check_disk_space
from firstsight.core.files import fingerprint_files, fingerprint_folder, link_file, whole_folder
from firstsight.core.processes import is_main_process, shared, use_all_gpus
from firstsight.core.stage import log, main
from firstsight.core.variants import leave_out

if TYPE_CHECKING:
    from torch import Tensor

    from firstsight.packing.dataset import ExpandedDataset
    from firstsight.packing.vision_tower import VisionTower

STUDENT, OUTPUT = Path("models/student"), Path("data/visual-tokens")
SPLITS = {split: Path(f"data/egoqa/{split}.parquet") for split in ("train", "validation")}
# Samples of a split from which the size on disk is estimated.
_LOOKED_AT = 16


def run() -> None:
    loaded = params.load()
    if loaded.train.caches_visual_tokens:
        cache(loaded.train, loaded.runtime)
        return
    reason = f"train.{'train_vision is true' if loaded.train.train_vision else 'visual_tokens is computed'}"
    leave_out(OUTPUT, reason)


def cache(settings: params.Train, runtime: params.Runtime) -> None:
    """Write the visual tokens of both splits."""
    use_all_gpus(runtime.device)
    # Imported here, because they take seconds, and a stage that is left out needs none of them.
    from firstsight.caching.shards import write_shared
    from firstsight.caching.visual_tokens import STAGE, VisualIndex, VisualTokensWriter, write_visual_index
    from firstsight.models.device import pick_device, training_precision
    from firstsight.models.loading import load_model
    from firstsight.models.processors import load_processor
    from firstsight.packing.dataset import ExpandedDataset
    from firstsight.packing.vision_tower import VisionTower
    from firstsight.records.parquet import Split

    device = pick_device(runtime.device)
    # As in training, so that the visual tokens are the same.
    precision = training_precision(settings.method, device)
    # Large files are read for it: by the main process, for all.
    made_from = provenance(precision) if is_main_process() else {}
    processor = load_processor(STUDENT)
    splits = {split: ExpandedDataset(Split(path), processor) for split, path in SPLITS.items()}
    with shared(scratch.kept_folder(STAGE, made_from | {"device": device})) as scratch_folder:
        tower = VisionTower(load_model(STUDENT, precision, device), device)
        check_room(tower, list(splits.values()))
        tokens = {}
        for split, dataset in splits.items():
            compute = partial(look, tower=tower, dataset=dataset, workers=runtime.data_workers)
            batches = [[one] for one in range(len(dataset))]
            label = f"{STAGE}: {split}"
            notes = write_shared(VisualTokensWriter, scratch_folder, split, batches, compute, label, "samples")
            tokens[split] = notes.get("tokens", 0)
        if is_main_process():
            samples = {split: len(dataset) for split, dataset in splits.items()}
            with whole_folder(OUTPUT) as folder:
                for shard in sorted(scratch_folder.glob("*.safetensors")):
                    link_file(shard, folder / shard.name)
                write_visual_index(folder, VisualIndex(**made_from, samples=samples, tokens=tokens))
    size = sum(path.stat().st_size for path in OUTPUT.iterdir())
    log.info("wrote %s: %s visual tokens, %.1f MB", OUTPUT, f"{sum(tokens.values()):,}", size / 1e6)


def provenance(precision: str) -> dict[str, Any]:
    """Return what the visual tokens are made from, as the index records it."""
    return {
        # Over all its files: config and processor change the tower's outputs as its weights do.
        "student": fingerprint_folder(STUDENT),
        "precision": precision,
        "data": {split: fingerprint_files([path]) for split, path in SPLITS.items()},
    }


def check_room(tower: "VisionTower", splits: list["ExpandedDataset"]) -> None:
    """Raise UserError unless the disk has room for the visual tokens, as estimated from a few samples of each split."""
    tokens = 0.0
    for dataset in splits:
        looked_at = range(0, len(dataset), max(1, len(dataset) // _LOOKED_AT))
        tokens += len(dataset) * sum(tower.count(dataset[index]) for index in looked_at) / len(looked_at)
    size = int(tokens * tower.bytes_per_token)
    log.info("visual tokens will take about %.1f MB", size / 1e6)
    for place in (OUTPUT, scratch.root()):
        check_disk_space(place, size, "free some space, or set train.visual_tokens to computed")


def look(
    batches: Sequence[Sequence[int]], *, tower: "VisionTower", dataset: "ExpandedDataset", workers: int
) -> Iterator[tuple["dict[str, Tensor]", "Tensor | None"]]:
    """Yield what `VisualTokensWriter.write` takes for each of the batches, which are the number of one sample each."""
    from torch.utils.data import DataLoader  # as in `cache`

    from firstsight.caching.visual_tokens import without_pixels

    for expanded in DataLoader(dataset, sampler=list(chain(*batches)), batch_size=None, num_workers=workers):
        tokens = tower.tokens(expanded)
        yield without_pixels(expanded), None if tokens is None else tokens.cpu()


if __name__ == "__main__":
    main(run, ())
