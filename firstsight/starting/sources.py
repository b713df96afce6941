"""Turn the name of data (a demo, a file, a data set of the hub) into the keys of the section `data` that read it."""

from collections.abc import Callable, Iterable
from typing import Any

from firstsight.core.errors import UserError
from firstsight.core.params import Hub
from firstsight.readers import hub_dataset
from firstsight.records.sample import SPLITS
from firstsight.starting.choices import DEMOS, Given, file_form, is_hub_data

# Asks which of a data set's columns holds a field of ours; None: none of them does.
AskColumn = Callable[[str, list[str]], str | None]


def data_keys(name: str, given: Given, ask_column: AskColumn | None) -> dict[str, Any]:
    """Return the keys of `data` for data called `name`, by the flags `source`, `config` and `fields`.

    A column of a data set of the hub that is called as a field of ours holds it, unless a flag says otherwise. What is
    called `text` or `class` is often a part of questions, and is taken only where a flag says so.

    Args:
        ask_column: is asked for the columns of question and answer where they are not known; None: nobody can be.

    Raises:
        UserError: the form of a file is not known, the data set cannot be loaded, or no column holds the question.
    """
    hub = given.source is None and is_hub_data(name)
    if (given.config or given.fields) and not hub:
        raise UserError(f"{name}: expected a data set of the hub with --config or --field, found none; leave them out")
    if name in DEMOS and given.source is None:
        return DEMOS[name].keys
    if not hub:
        return {"source": given.source or file_form(name), "path": name}
    named = parse_fields(given.fields)
    splits, columns = hub_dataset.layout(Hub(id=name, config=given.config, revision=None, splits={}, fields={}))
    fields = {column: column for column in columns if column in {*hub_dataset.FIELDS} - {"text", "class"}} | named
    for ours, others in (("question", set()), ("answer", {"answers"})):
        if not {ours, *others} & fields.keys() and ask_column and (theirs := ask_column(ours, columns)):
            fields[ours] = theirs
    if "question" not in fields:
        raise UserError(
            f"{name}: expected a column 'question', found {columns}; say which holds it with --field question=COLUMN"
        )
    hub_keys = {"id": name, "config": given.config, "revision": None, "splits": split_names(splits), "fields": fields}
    return {"source": "hub", "hub": hub_keys}


def options(keys: dict[str, Any], given: Given) -> tuple[str, ...]:
    """Return the words of the command line with which the same data give the same `keys` again."""
    words = ["--source", given.source] if given.source else []
    if (hub := keys.get("hub")) and keys not in [demo.keys for demo in DEMOS.values()]:
        words += ["--config", hub["config"]] if hub["config"] else []
        for ours, theirs in hub["fields"].items():
            words += ["--field", f"{ours}={theirs}"] if ours != theirs else []
    return tuple(words)


def split_names(theirs: list[str]) -> dict[str, str]:
    """Return which of our splits each of a data set's splits is; what it lacks is split off by group."""
    if {*SPLITS} <= {*theirs}:
        return {split: split for split in SPLITS}
    named = {split: split for split in theirs if split in ("validation", "test")}
    return {split: named.get(split, "by group") for split in theirs}


def parse_fields(given: Iterable[str]) -> dict[str, str]:
    """Return the fields of `--field OURS=THEIRS`.

    Raises:
        UserError: one has another form, or is of a field that readers do not know.
    """
    found = dict[str, str]()
    for text in given:
        ours, equals, theirs = text.partition("=")
        if not equals or not theirs or ours not in hub_dataset.FIELDS:
            raise UserError(
                f"--field {text}: expected OURS=THEIRS with OURS one of {', '.join(hub_dataset.FIELDS)}, found another "
                "form; correct it"
            )
        found[ours] = theirs
    return found
