"""Build the EgoQA data set: records from a source, media decoded once, three splits by group, and a data card.

    python -m stages.build_egoqa_dataset

reads  the source that `data` names in params.yaml
writes data/egoqa/{train,validation,test}.parquet and data/egoqa/card.json
"""

from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from firstsight.core import params
from firstsight.core.errors import UserError
from firstsight.core.files import whole_folder, write_json
from firstsight.core.stage import log, main
from firstsight.data.records import SPLITS, SplitWriter
from firstsight.sources import jsonl, synthetic
from firstsight.sources.splits import split_of, without_duplicates

OUTPUT = Path("data/egoqa")
SOURCES = {"synthetic": synthetic.read, "jsonl": jsonl.read}


def run() -> None:
    data = params.load().data
    counts, dropped = {split: Counter() for split in SPLITS}, Counter()
    samples = without_duplicates(SOURCES[data.source](data), dropped)
    with whole_folder(OUTPUT) as folder:
        with ExitStack() as files:
            writers = {split: files.enter_context(SplitWriter(folder / f"{split}.parquet")) for split in SPLITS}
            for sample, given_split in tqdm(samples, desc="build-egoqa-dataset", unit=" samples"):
                split = given_split or split_of(sample.group, data)
                if split == "test":
                    asked = tuple(r for r in sample.records if r.question_type not in data.train_only_types)
                    sample = replace(sample, records=asked)
                if sample.records:
                    writers[split].write(sample)
                    counts[split]["samples"] += 1
                    counts[split].update(f"type: {record.question_type}" for record in sample.records)
                    counts[split]["records"] += len(sample.records)
        totals = {split: counts[split]["records"] for split in SPLITS}
        if empty := [split for split in SPLITS if not totals[split]]:
            raise UserError(
                f"data: expected records in every split, found none in {', '.join(empty)} (of {totals}); "
                "add records, change data.*_fraction, or give records a split of their own"
            )
        write_json(
            folder / "card.json",
            {
                "source": data.source,
                "splits": {split: dict(sorted(counts[split].items())) for split in SPLITS},
                "dropped": dict(dropped),
            },
        )
    log.info(
        "wrote %s: %s",
        OUTPUT,
        ", ".join(f"{split} {totals[split]:,} records about {counts[split]['samples']:,} media" for split in SPLITS),
    )


if __name__ == "__main__":
    main(run)
