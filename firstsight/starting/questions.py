"""Ask a person at a terminal, one question after the other; Enter takes the default.

Each function raises KeyboardInterrupt on Ctrl-C, and where text is typed on Ctrl-D.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import questionary
from questionary import Choice, Question, Style

from firstsight.core.classes import template_columns
from firstsight.core.errors import UserError
from firstsight.starting import screen
from firstsight.starting.choices import (
    ALPHA,
    APPROACHES,
    DEMOS,
    KINDS,
    MAX_TOKENS,
    METHODS,
    PAIRS,
    PROMPT,
    TEMPERATURE,
    TRIAL,
    Approach,
    Kind,
    Method,
    check_max_tokens,
    check_model,
    check_number,
    check_prompt,
    check_samples,
    typed,
)

_STYLE = Style([("pointer", "bold"), ("highlighted", "bold"), ("selected", "noreverse"), ("instruction", "italic")])
_OTHER = "other"


def approach() -> Approach:
    return _select("What do you want to do?", [(name, title, "") for name, title in APPROACHES.items()])


def method() -> Method:
    titles = {"lora": "LoRA", "qlora": "QLoRA", "adalora": "AdaLoRA", "full": "full"}
    return _select("By which method?", [(name, titles[name], text) for name, text in METHODS.items()])


def model(role: Literal["teacher", "student"], teacher: str | None) -> str:
    """Ask for a model: one of those suggested, a hub id or a folder. A teacher's own student is the default."""
    rows = [
        (getattr(pair, role), getattr(pair, role), f"{pair.sizes[role == 'student']}, {pair.reads}") for pair in PAIRS
    ]
    partner = next((pair.student for pair in PAIRS if pair.teacher == teacher), None)
    question = f"Which {role}?" if teacher or role == "teacher" else "Which model?"
    chosen = _select(question, [*rows, (_OTHER, "another one", "a hub id, or a folder")], default=partner)
    if chosen != _OTHER:
        return chosen
    return _path("Hub id (owner/name) or folder:", _checked(check_model))


def data() -> str:
    """Ask for data, and return the name of a demo, the path of a file, or the id of a data set of the hub."""
    own = (_OTHER, "your own", "a file of questions and answers, classes or texts, or a data set of the hub")
    chosen = _select("Which data?", [own, *((name, f"demo {name}", demo.title) for name, demo in DEMOS.items())])
    if chosen != _OTHER:
        return chosen
    there = "expected a path or an id, found nothing"
    return _path("File (.jsonl, .csv, .txt, ...) or hub id (owner/name):", lambda text: bool(text.strip()) or there)


def kind() -> Kind:
    names = {"question": "questions", "class": "classes", "text": "texts"}
    return _select("What are the records?", [(one, names[one], what) for one, what in KINDS.items()])


def column(ours: str, columns: list[str]) -> str | None:
    """Ask which column of a data set holds the question, answer, class or text; None: none of them has the answer."""
    rows = [(name, name, "") for name in columns]
    nothing = [(_OTHER, "none of them", "the teacher is to answer")] if ours == "answer" else []
    chosen = _select(f"Which column holds the {ours}?", [*rows, *nothing])
    return None if chosen == _OTHER else chosen


def prompt(columns: tuple[str, ...], default: str | None) -> str:
    """Ask for the template of the question about a record's class, of some of the `columns` that there are."""
    screen.note(PROMPT, "italic")
    screen.note(f"Columns: {', '.join(columns)}")

    def check(text: str) -> None:
        if unknown := [name for name in template_columns(check_prompt(text)) if name not in columns]:
            raise UserError(f"prompt: expected columns of {', '.join(columns)}, found {unknown[0]!r}; correct it")

    asked = questionary.text("Prompt?", typed(default or ""), validate=_checked(check), style=_STYLE)
    return check_prompt(_ask(asked).strip())


def max_tokens(default: int) -> int:
    screen.note(MAX_TOKENS, "italic")
    asked = questionary.text(
        "How many tokens at most?", str(default), validate=_checked(check_max_tokens), style=_STYLE
    )
    return check_max_tokens(_ask(asked).strip())


def temperature(default: float) -> float:
    return _number("temperature", "Temperature T?", TEMPERATURE, default)


def alpha(default: float) -> float:
    return _number("alpha", "Alpha?", ALPHA, default)


def samples(there: int) -> int | None:
    """Ask for the size of a trial, in training records of the `there` that there are; None: all."""
    default = str(TRIAL) if there > TRIAL else "all"
    text = f"How many training records, of {there:,}? A number, or all:"
    return check_samples(_ask(questionary.text(text, default, validate=_checked(check_samples), style=_STYLE)).strip())


def confirm(text: str, default: bool) -> bool:
    return _ask(questionary.confirm(text, default=default, style=_STYLE))


def _path(text: str, validate: Callable[[str], bool | str]) -> str:
    """Ask for a path, completed by the tabulator, or an id."""
    return str(Path(_ask(questionary.path(text, validate=validate, style=_STYLE)).strip()).expanduser())


def _number(key: Literal["temperature", "alpha"], text: str, what: str, default: float) -> float:
    screen.note(what, "italic")
    asked = questionary.text(text, f"{default:g}", validate=_checked(lambda one: check_number(key, one)), style=_STYLE)
    return check_number(key, _ask(asked))


def _select(text: str, rows: list[tuple[str, str, str]], default: str | None = None) -> Any:
    """Ask for one of the rows of value, name and explanation, with the explanations below each other."""
    width = max(len(name) for _, name, _ in rows)
    choices = [Choice(f"{name:{width}}  {what}".rstrip(), value) for value, name, what in rows]
    shown = {"style": _STYLE, "instruction": "(arrow keys, Enter)", "erase_when_done": True}
    chosen = _ask(questionary.select(text, choices, default=default, **shown))
    screen.answered(text, next(name for value, name, _ in rows if value == chosen))
    return chosen


def _checked(check: Callable[[str], object]) -> Callable[[str], bool | str]:
    """Return what questionary asks whether a text is right: True, or the message of `check`."""

    def valid(text: str) -> bool | str:
        try:
            check(text.strip())
        except UserError as error:
            return str(error)
        return True

    return valid


def _ask(question: Question) -> Any:
    try:
        return question.unsafe_ask()
    except EOFError:
        raise KeyboardInterrupt from None
