"""Run the student's frozen vision tower once over every image and video of the train and validation splits.

    python -m stages.cache_visual_tokens

distill and finetune-student then train on its outputs, the visual tokens, and neither run the tower nor process pixels.

reads  models/student, the train and validation splits, `method`, `train_vision` and `visual_tokens` of `train` in
       params.yaml
writes data/visual-tokens (its files: `firstsight.caching.visual_tokens`); if the tower is trained, or visual tokens are
       computed in every epoch, left-out.json with the reason instead
"""

from pathlib import Path
from typing import TYPE_CHECKING

from firstsight.core import params, scratch
from firstsight.core.faults import check_disk_space
from firstsight.core.files import fingerprint_files, fingerprint_folder, link_file, whole_folder, write_json
from firstsight.core.progress import progress
from firstsight.core.stage import log, main
from firstsight.core.variants import LEFT_OUT

if TYPE_CHECKING:
    from firstsight.caching.visual_tokens import VisualTokensWriter
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
    with whole_folder(OUTPUT) as folder:
        write_json(folder / LEFT_OUT, reason)
    log.info("%s is left out: %s", OUTPUT, reason)


def cache(settings: params.Train, runtime: params.Runtime) -> None:
    """Write the visual tokens of both splits."""
    # Imported here, because they take seconds, and a stage that is left out needs none of them.
    from firstsight.caching.visual_tokens import VisualIndex, VisualTokensWriter, write_visual_index
    from firstsight.models.loading import load_model, load_processor, pick_device, training_precision
    from firstsight.packing.dataset import ExpandedDataset
    from firstsight.packing.vision_tower import VisionTower
    from firstsight.records.parquet import Split

    device = pick_device(runtime.device)
    made_from = {
        # Over all its files: config and processor change the tower's outputs as its weights do.
        "student": fingerprint_folder(STUDENT),
        # As in training, so that the visual tokens are the same.
        "precision": training_precision(settings.method, device),
        "data": {split: fingerprint_files([path]) for split, path in SPLITS.items()},
    }
    processor = load_processor(STUDENT)
    splits = {split: ExpandedDataset(Split(path), processor) for split, path in SPLITS.items()}
    with scratch.kept_folder("cache-visual-tokens", made_from | {"device": device}) as scratch_folder:
        tower = VisionTower(load_model(STUDENT, made_from["precision"], device), device)
        check_room(tower, list(splits.values()))
        writers = {split: VisualTokensWriter(scratch_folder, split) for split in splits}
        for split, writer in writers.items():
            look(tower, splits[split], writer, f"cache-visual-tokens: {split}", runtime.data_workers)
        tokens = {split: writer.tokens for split, writer in writers.items()}
        samples = {split: writer.records for split, writer in writers.items()}
        with whole_folder(OUTPUT) as folder:
            for shard in sorted(scratch_folder.glob("*.safetensors")):
                link_file(shard, folder / shard.name)
            write_visual_index(folder, VisualIndex(**made_from, samples=samples, tokens=tokens))
    size = sum(path.stat().st_size for path in OUTPUT.iterdir())
    log.info("wrote %s: %s visual tokens, %.1f MB", OUTPUT, f"{sum(tokens.values()):,}", size / 1e6)


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
    tower: "VisionTower", dataset: "ExpandedDataset", writer: "VisualTokensWriter", label: str, workers: int
) -> None:
    """Run the tower over the samples that the writer has not written yet, and write their visual tokens."""
    from torch.utils.data import DataLoader  # as in `cache`

    if writer.records:
        log.info("%s: resuming after sample %d of %d", label, writer.records, len(dataset))
    remaining = range(writer.records, len(dataset))
    with progress(desc=label, unit="samples", total=len(dataset), initial=writer.records) as shown:
        for expanded in DataLoader(dataset, sampler=remaining, batch_size=None, num_workers=workers):
            writer.write(expanded, tower.tokens(expanded))
            shown.update()
    writer.finish()


if __name__ == "__main__":
    main(run, ())
