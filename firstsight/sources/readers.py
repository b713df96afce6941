"""The reader of each kind of source: `read(data, problems)` gives its questions in order."""

from collections.abc import Callable, Iterator

from firstsight.core.params import Data
from firstsight.sources import egoschema, egotempo, hub, jsonl, llava, openeqa, synthetic, table
from firstsight.sources.problems import Problems
from firstsight.sources.question import Asked

READERS: dict[str, Callable[[Data, Problems], Iterator[Asked]]] = {
    "synthetic": synthetic.read,
    "jsonl": jsonl.read,
    "csv": table.read,
    "llava": llava.read,
    "egoschema": egoschema.read,
    "openeqa": openeqa.read,
    "egotempo": egotempo.read,
    "hub": hub.read,
}
