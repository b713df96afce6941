"""Turn the name of data (a demo, a file, a data set of the hub) into the keys of the section `data` that read it."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from firstsight.core.errors import UserError
from firstsight.core.params import Hub
from firstsight.readers import hub_dataset
from firstsight.readers.problems import BadRecordError
from firstsight.readers.source_record import OF_QUESTIONS
from firstsight.readers.text_files import as_object, read_lines, read_text
from firstsight.records.sample import SPLITS
from firstsight.starting.choices import DEMOS, Given, Kind, file_form, is_hub_data, typed

# The shares of records of a class that are held back where the data have no split of their own for it.
_SHARES = {"validation": 0.1, "test": 0.1}


@dataclass(frozen=True)
class Layout:
    """Hold what is known of data before their records are read.

    `keys` are those of the section `data`, and `kind` says what the records are. Where they are of a class, `texts` are
    the columns that the question is made from, unless a person says otherwise, and `columns` all that there are.
    """

    keys: dict[str, Any]
    kind: Kind
    columns: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    def prompt(self) -> str | None:
        """Return the template of the question that is suggested; None: there is no column to make it from."""
        if "question" in self.columns:
            return "{question}"
        lines = [f"{{{name}}}" for name in self.texts if not re.search(r"[{}!:]", name)]
        return "\n".join([*lines, "", "Which class?"]) if lines else None


def layout(name: str, given: Given, ask: ModuleType | None) -> Layout:
    """Return what is known of data called `name`, by the flags `source`, `config` and `fields` and by their columns.

    A column `question` makes them questions, unless there is a column `class` in a file, and no answer. A column
    `class`, or the only one of datasets' type ClassLabel, makes them records of a class, and `text` alone texts. A
    column of a data set of the hub that is called as a field of ours holds it, unless a flag says otherwise.

    Args:
        ask: the module `questions`, which is asked for the columns that are not known; None: nobody can be.

    Raises:
        UserError: the form of a file is not known, the file or data set cannot be read, or no column holds what is
            asked about.
    """
    hub = given.source is None and is_hub_data(name)
    if (given.config or given.fields) and not hub:
        raise UserError(
            f"{name}: expected a data set of the hub, or the folder of one, with --config or --field, found another; "
            "leave them out, and call the columns of a file question and answer, text, or class"
        )
    if hub:
        return _of_hub(name, given, ask)
    if name in DEMOS and given.source is None:
        keys = DEMOS[name].keys
    else:
        keys = {"source": given.source or file_form(name), "path": name}
    if keys["source"] == "hub":
        return Layout(keys, "text" if "text" in keys["hub"]["fields"] else "question")
    first = _first(keys["source"], keys.get("path", ""))
    kind = "text" if keys["source"] == "text" else _kind(first) or "question"
    if kind == "class":
        keys = keys | _held_back(())
    return Layout(keys, kind, tuple(first), tuple(name for name, value in first.items() if _is_text(name, value)))


def options(keys: dict[str, Any], name: str, given: Given) -> tuple[str, ...]:
    """Return the words of the command line with which the data called `name` give the same `keys` again."""
    words = ["--source", given.source] if given.source else []
    if (hub := keys.get("hub")) and name not in DEMOS:
        words += ["--config", hub["config"]] if hub["config"] else []
        for ours, theirs in hub["fields"].items():
            words += ["--field", f"{ours}={theirs}"] if ours != theirs or ours in ("text", "class") else []
    return (*words, *(["--prompt", typed(keys["prompt"])] if "prompt" in keys else []))


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


def _of_hub(name: str, given: Given, ask: ModuleType | None) -> Layout:
    """Return what is known of a data set of the hub, or of a folder of one."""
    named = parse_fields(given.fields)
    theirs, features = hub_dataset.layout(Hub(id=name, config=given.config, revision=None, splits={}, fields={}))
    kind = _hub_kind(features, named) or (ask.kind() if ask else None)
    found = _fields(features, named, kind) if kind else {}
    if kind is None or (kind not in found and not ask):
        raise UserError(
            f"{name}: expected a column 'question', 'class' or 'text', found {[*features]}; say which holds it with "
            "--field question=COLUMN, class=COLUMN or text=COLUMN"
        )
    for ours, others in (("question", {}), ("answer", {"answers"})) if kind == "question" else ((kind, {}),):
        if not {ours, *others} & found.keys() and ask and (column := ask.column(ours, [*features])):
            found[ours] = column
    splits = split_names(theirs)
    hub = {"id": name, "config": given.config, "revision": None, "splits": splits, "fields": found}
    texts = [one for one, type_ in features.items() if "string" in str(getattr(type_, "dtype", ""))]
    return Layout(
        {"source": "hub", "hub": hub, **(_held_back(splits.values()) if kind == "class" else {})},
        kind,
        tuple(features),
        tuple(one for one in texts if one not in found.values()),
    )


def _hub_kind(features: Mapping[str, Any], named: Mapping[str, str]) -> Kind | None:
    """Return what the records of a data set of the hub are; None if it cannot be told."""
    for kind in ("class", "text", "question"):
        if kind in named:
            return kind
    # What is called `text` or `class` is often a part of questions.
    return "question" if "question" in features else "class" if _label(features) else _kind(features)


def _label(features: Mapping[str, Any]) -> str | None:
    """Return the only column of datasets' type ClassLabel, if there is one."""
    labels = [column for column, feature in features.items() if getattr(feature, "names", None)]
    return labels[0] if len(labels) == 1 else None


def _fields(features: Mapping[str, Any], named: Mapping[str, str], kind: Kind) -> dict[str, str]:
    """Return which column of a data set of the hub holds which of our fields."""
    others = {"text", "class"} - {kind}
    # A class or a text stands in the place of a question and its answer, and a text has no media.
    if kind != "question":
        others |= {*OF_QUESTIONS} | ({*hub_dataset.MEDIA, "start", "end"} if kind == "text" else set())
    found = {column: column for column in features if column in {*hub_dataset.FIELDS} - others}
    if kind == "class" and (label := _label(features)):
        found["class"] = label
    return found | named


def _kind(columns: Iterable[str]) -> Kind | None:
    """Return what the records with such columns are; None if it cannot be told."""
    names = {*columns}
    if "class" in names and not {"answer", "answers"} & names:
        return "class"
    return next((kind for kind in ("question", "text") if kind in names), None)


def _held_back(splits: Iterable[str]) -> dict[str, float]:
    """Return the keys of `data` for the share of each split but train, of which data have `splits` themselves."""
    own = {*splits}
    return {f"{split}_fraction": 0.0 if split in own else share for split, share in _SHARES.items()}


def _first(form: str, path: str) -> dict[str, Any]:
    """Return the first record of a file as it stands there; {} for other forms, and where the reader will refuse it."""
    if form == "csv":
        rows = csv.reader(io.StringIO(read_text(Path(path), "a CSV file")))
        try:
            columns, cells = ([cell.strip() for cell in next(rows, [])] for _ in range(2))
        except csv.Error:
            return {}
        return {name: value for name, value in (dict.fromkeys(columns, "") | _zipped(columns, cells)).items() if name}
    if form == "jsonl":
        try:
            return as_object(next(text for _, text in read_lines(Path(path), "a JSON Lines file")))
        except BadRecordError:
            return {}
    return {}


def _zipped(columns: Sequence[str], cells: Sequence[str]) -> dict[str, str]:
    return dict(zip(columns, cells, strict=False))


def _is_text(name: str, value: Any) -> bool:
    """Return whether the column of a file holds text that is none of our fields but `text`, by its first value."""
    if name in {*hub_dataset.FIELDS, "media"} - {"text"} or not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return True
    return False
