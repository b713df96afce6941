"""Map each kind of source to its reader: `read(data, problems)` yields the source's questions in order."""

from collections.abc import Callable, Iterator

from firstsight.core.params import Data
from firstsight.readers import csv_file, egoschema, egotempo, hub_dataset, jsonl, llava, openeqa, plain_text
from firstsight.readers.problems import Problems
from firstsight.readers.source_record import Asked
from firstsight.scenes import synthetic

READERS: dict[str, Callable[[Data, Problems], Iterator[Asked]]] = {
    "synthetic": synthetic.read,
    "jsonl": jsonl.read,
    "csv": csv_file.read,
    "llava": llava.read,
    "egoschema": egoschema.read,
    "openeqa": openeqa.read,
    "egotempo": egotempo.read,
    "text": plain_text.read,
    "hub": hub_dataset.read,
}
