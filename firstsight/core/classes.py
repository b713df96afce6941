"""Check the names of classes, and the template that asks for one."""

import string
import unicodedata


def classes_apart(names: list[str]) -> list[str]:
    """Return the names of classes in Unicode's composed form, as records are stored.

    Raises:
        ValueError: there are fewer than two, one is blank, or evaluation takes two for the same answer, as by case or
            by articles (`firstsight.core.words.normalise`).
    """
    # Imported here, because every stage reads the parameters, and few runs have classes.
    from firstsight.core.words import normalise

    if len(names) < 2:
        raise ValueError(f"expected at least two classes, found {names}; name all that the data have")
    wordings: dict[str, str] = {}
    for name in names:
        other = wordings.setdefault(normalise(name), name)
        if other is not name:
            raise ValueError(f"expected a wording of its own for each class, found {other!r} and {name!r}; rename one")
    if "" in wordings:
        raise ValueError(f"expected a name for each class, found {wordings['']!r}; name it")
    return [unicodedata.normalize("NFC", name.strip()) for name in names]


def template_columns(template: str) -> list[str]:
    """Return the names in braces of a prompt template such as "{title}\\n{text}", each once, in their order.

    Raises:
        ValueError: there is none, a brace has no partner, or there is more than a name between two braces.
    """
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(
            f"expected columns in braces, found {template!r} ({error}); double a brace of the text"
        ) from None
    if not parts or not all(name and not form and not conversion for name, form, conversion in parts):
        raise ValueError(f"expected names of columns in braces, such as {{text}}, found {template!r}; correct it")
    return list(dict.fromkeys(str(name) for name, *_ in parts))
