"""Say which keys a record of a file has, and fill `data.prompt` with its columns.

A record's key `class` names its class, where there are classes: it stands in the place of `answer`, `answers` and
`options`. A record with the key `text` is a text, which nothing is asked about. With `data.prompt`, the question is
made from the columns that the template names; others are ignored unless they are keys.
"""

from collections.abc import Mapping
from string import Formatter
from typing import Any

from firstsight.core.classes import template_columns
from firstsight.core.params import Data
from firstsight.readers.problems import BadRecordError
from firstsight.readers.source_record import SourceRecord
from firstsight.records.sample import composed

MEDIA_KEYS = ("media", "start", "end")
# What Zhao et al. (2021, arXiv:2102.09690) put in the place of a record's text, to measure the prior of a wording.
CONTENT_FREE = ("N/A", "[MASK]", "")
_KEYS = (*MEDIA_KEYS, *(name for name in SourceRecord.model_fields if name != "place"), "text")


def keys(data: Data) -> tuple[str, ...]:
    """Return the keys that a record may have, apart from the columns of `data.prompt`."""
    others = {"answer", "answers", "options", "text"} if data.classes else set()
    if data.prompt is not None:
        others |= {"question", "text"}
    return (*(name for name in _KEYS if name not in others), *(["class"] if data.classes else []))


def columns_of(data: Data) -> list[str]:
    """Return the columns that the question is made from."""
    return ["question"] if data.prompt is None else template_columns(data.prompt)


def ours(values: Mapping[str, Any], data: Data) -> dict[str, Any]:
    """Return the values of a record under the names of `SourceRecord` and `MEDIA_KEYS`.

    Raises:
        BadRecordError: there is an unknown key, and no `data.prompt`; or as `filled` raises.
    """
    known = keys(data)
    if data.prompt is None and (unknown := [key for key in values if key not in known]):
        raise BadRecordError(f"expected one of {sorted(known)}, found the key {unknown[0][:60]!r}; rename or remove it")
    found = {"answer" if key == "class" else key: value for key, value in values.items() if key in known}
    return found if data.prompt is None else found | {"question": filled(data.prompt, values)}


def filled(template: str, values: Mapping[str, Any]) -> str:
    """Return the template with the record's values for the columns that it names; null counts as empty.

    Raises:
        BadRecordError: a column is missing, a value is neither text nor a number, or all are empty.
    """
    names = template_columns(template)
    if missing := [name for name in names if name not in values]:
        raise BadRecordError(
            f"expected the key {missing[0]!r}, which data.prompt names, found {sorted(values)}; add it, or correct "
            "data.prompt"
        )
    texts = {name: "" if values[name] is None else values[name] for name in names}
    for name, value in texts.items():
        if not isinstance(value, str | int | float):
            raise BadRecordError(f"{name}: expected text for data.prompt, found {str(value)[:60]!r}; correct it")
    if not any(str(value).strip() for value in texts.values()):
        raise BadRecordError(f"expected text in {' or '.join(names)} for data.prompt, found none; remove the record")
    return _replaced(template, texts)


def content_free(template: str) -> tuple[str, ...]:
    """Return the template filled with each of the content-free inputs, in the form of questions."""
    names = template_columns(template)
    return tuple(composed(_replaced(template, dict.fromkeys(names, text)).strip()) for text in CONTENT_FREE)


def _replaced(template: str, texts: Mapping[str, Any]) -> str:
    # Not by format_map, which would take "{a.b}" for an attribute of the value.
    parts = Formatter().parse(template)
    return "".join(text + ("" if name is None else str(texts[name])) for text, name, *_ in parts)
