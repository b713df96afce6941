"""Map each kind of source to its reader: `read(data, problems)` yields the source's questions in order."""

from collections.abc import Callable, Iterator

from firstsight.core.classes import classes_apart
from firstsight.core.errors import UserError
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


def with_classes(data: Data) -> Data:
    """Return `data` with the names of the classes: its own, or those of the hub's column that is mapped to `class`.

    Raises:
        UserError: there are no names for that column, only one, or two of the same wording.
    """
    if data.classes or data.source != "hub" or "class" not in data.hub.fields:
        return data
    column = data.hub.fields["class"]
    if (names := hub_dataset.class_names(data.hub)) is None:
        raise UserError(
            f"data.classes: expected the names of the classes, because the column {column!r} of {data.hub.id} has none "
            "(it is no ClassLabel), found null; list them"
        )
    try:
        return data.model_copy(update={"classes": classes_apart(names)})
    except ValueError as error:
        raise UserError(f"{data.hub.id}: column {column!r}: {error}") from None
