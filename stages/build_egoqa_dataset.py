"""Build the EgoQA data set: read a source's records, decode images and videos, split by group, and write a data card.

    python -m stages.build_egoqa_dataset

reads  the source that `data` names in params.yaml, and a benchmark if it names one
writes data/egoqa/{train,validation,test}.parquet and data/egoqa/card.json
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from firstsight.assembly.assemble import Unit, assemble
from firstsight.assembly.data_card import data_card
from firstsight.assembly.decoding import Decoded, Decoder
from firstsight.assembly.near_duplicates import without_copies, without_leaks
from firstsight.assembly.sources import READERS, with_classes
from firstsight.core import params, scratch
from firstsight.core.errors import UserError
from firstsight.core.files import whole_folder, write_json
from firstsight.core.stage import log, main
from firstsight.readers import hub_dataset
from firstsight.readers.columns import content_free
from firstsight.readers.problems import Problems
from firstsight.readers.source_record import Asked, SourceRecord, SourceText
from firstsight.records.parquet import SplitWriter
from firstsight.records.sample import SPLITS, Sample

OUTPUT = Path("data/egoqa")


def run() -> None:
    data = with_classes(params.load().data)
    problems = Problems(data.on_error)
    dropped = problems.left_out
    units = assemble(sources(data, problems), data, problems, dropped)
    check_splits(
        {split: sum(len(unit.questions) for unit in units if unit.split == split) for split in SPLITS}, problems
    )
    if data.classes:
        check_classes(units, data.classes)
    with scratch.kept_folder("build-egoqa-dataset", {"path": data.path, "source": data.source}) as kept:
        decoder = Decoder(kept, units, data)
        written = without_copies(without_leaks(decoder.run(problems), dropped), dropped)
        counts = {split: sum(len(unit.questions) for unit, _ in written if unit.split == split) for split in SPLITS}
        check_splits(counts, problems)
        with whole_folder(OUTPUT) as folder:
            write(folder, decoder, written, data)
            commit = hub_dataset.commit(data.hub) if data.source == "hub" else None
            write_json(folder / "card.json", data_card(data, commit, written, dropped, problems))
    log_result(data, counts, problems)


def sources(data: params.Data, problems: Problems) -> Iterator[tuple[str, Iterator[Asked]]]:
    """Yield name and questions of the source, then of the benchmark if there is one, all of it for the test split."""
    yield name(data), READERS[data.source](data, problems)
    benchmark = data.benchmark
    if benchmark.source != "none":
        other = data.model_copy(update=benchmark.model_dump())
        asked = READERS[benchmark.source](other, problems)
        yield f"benchmark {name(other)}", (Asked(of_benchmark(one.record), one.media) for one in asked)


def of_benchmark(record: SourceRecord) -> SourceRecord:
    """Return the record with an id that is marked as the benchmark's, in the test split."""
    return record.model_copy(update={"id": f"benchmark-{record.id}", "split": "test"})


def name(data: params.Data) -> str:
    """Return what samples and the data card call the source: its kind, hub id or file name."""
    if data.source == "synthetic":
        return "synthetic"
    return data.hub.id if data.source == "hub" else Path(data.path).name


def write(folder: Path, decoder: Decoder, written: list[tuple[Unit, Decoded]], data: params.Data) -> None:
    """Write each split's parquet file, with samples in the order of the source."""
    units = {unit.key: unit for unit, _ in written}
    texts = isinstance(written[0][0].questions[0], SourceText)
    most = data.max_tokens if texts else None
    neutral = content_free(data.prompt) if data.classes and data.prompt else ()
    with ExitStack() as files:
        writers = {
            split: files.enter_context(SplitWriter(folder / f"{split}.parquet", data.classes or (), most, neutral))
            for split in SPLITS
        }
        for key, decoded in decoder.media():
            if unit := units.get(key):
                kind = unit.media.kind if unit.media else "none"
                writers[unit.split].write(
                    Sample(key, unit.group, unit.source, kind, decoded.frames, decoded.fps, unit.records())
                )


def check_splits(counts: dict[str, int], problems: Problems) -> None:
    """Raise UserError if a split has no records, saying what was left out and skipped."""
    if empty := [split for split in SPLITS if not counts[split]]:
        left_out = f"; left out: {listed(problems.left_out)}" if problems.left_out else ""
        skipped = (
            f"; {problems.count:,} records could not be used, first: {problems.first[0]}" if problems.count else ""
        )
        raise UserError(
            f"data: expected records in every split, found none in {', '.join(empty)} (of {counts}); "
            f"add records, change data.*_fraction, or give records a split of their own{left_out}{skipped}"
        )


def check_classes(units: list[Unit], classes: Sequence[str]) -> None:
    """Raise UserError unless the records have two classes or more; warn of classes that none has."""
    found = {one.answer for unit in units for one in unit.questions if one.answer}
    if len(found) < 2:
        raise UserError(
            f"data.classes: expected records of at least two of the {len(classes)} classes, found {len(found)} "
            f"({', '.join(found) or 'no label'}); add records of the others"
        )
    if missing := [name for name in classes if name not in found]:
        log.warning("data.classes: %d of %d classes have no record: %s", len(missing), len(classes), missing[:10])


def log_result(data: params.Data, counts: dict[str, int], problems: Problems) -> None:
    """Log how many records each split has, and what was left out and skipped."""
    log.info("wrote %s: %s", OUTPUT, ", ".join(f"{split} {count:,} records" for split, count in counts.items()))
    for split, count in counts.items():
        if (asked_for := getattr(data, f"{split}_samples") or 0) > count:
            log.warning("data.%s_samples: %d records were asked for, and only %d found", split, asked_for, count)
    if problems.left_out:
        log.info("left out: %s", listed(problems.left_out))
    if problems.count:
        log.warning("skipped %d records that cannot be used, first: %s", problems.count, problems.first[0])


def listed(dropped: Counter[str]) -> str:
    """Return the counts and reasons of questions left out as one line."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()))


if __name__ == "__main__":
    main(run, ())
