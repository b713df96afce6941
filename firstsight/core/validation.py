"""One sentence for what pydantic found wrong with values: key, what was expected, what was found."""

from dataclasses import dataclass

from pydantic import ValidationError
from pydantic_core import ErrorDetails

# What pydantic calls an error, as what was expected.
_EXPECTED = {
    "missing": "a value",
    "extra_forbidden": "a known key",
    "unexpected_keyword_argument": "a known key",
    "float_type": "a number",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_unicode": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section of keys",
    "too_short": "a list of at least {min_length}",
    "too_long": "at most {max_length} values",
    "string_too_short": "text that is not empty",
    "string_too_long": "at most {max_length} characters",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "one of {expected}",
    "finite_number": "a finite number",
}
# What was found, where it is not the value itself.
_FOUND = {
    "missing": "none",
    "extra_forbidden": "an unknown one",
    "unexpected_keyword_argument": "an unknown one",
    "string_unicode": "half of a character (a lone surrogate)",
    "too_long": "{actual_length}",
}
_LONGEST = 200


@dataclass(frozen=True)
class Mistake:
    """Describe a wrong value: the path of its key, pydantic's type of the error, and a sentence without a remedy."""

    path: tuple[str | int, ...]
    kind: str
    sentence: str


def mistakes(error: ValidationError) -> list[Mistake]:
    """Return every mistake, unknown keys first: a misspelt key is also a missing one, and what was written says more.

    Sentences read "key: expected X, found Y"; values that are longer than 200 characters are cut.
    """
    found = [_mistake(one) for one in error.errors(include_url=False)]
    return sorted(found, key=lambda one: one.kind not in ("extra_forbidden", "unexpected_keyword_argument"))


def describe(error: ValidationError) -> str:
    """Return the sentence of the first mistake."""
    return mistakes(error)[0].sentence


def _mistake(error: ErrorDetails) -> Mistake:
    kind, context, path = error["type"], error.get("ctx", {}), error["loc"]
    if kind == "value_error":  # raised by a validator of ours, with its own message
        sentence = str(context["error"])
    else:
        expected = _EXPECTED[kind].format(**context) if kind in _EXPECTED else error["msg"]
        found = _FOUND[kind].format(**context) if kind in _FOUND else repr(error["input"])[:_LONGEST]
        sentence = f"expected {expected}, found {found}"
    key = ".".join(map(str, path))
    return Mistake(path, kind, f"{key}: {sentence}" if key else sentence)
