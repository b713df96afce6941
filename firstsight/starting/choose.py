"""Make the choices: what flags have answered is taken, the rest is asked for, or has the value that Enter gives."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from firstsight.core.errors import UserError
from firstsight.core.params import Data, Model
from firstsight.core.validation import describe
from firstsight.starting import screen, settings
from firstsight.starting.choices import TRIAL, Choices, Given, check_samples

if TYPE_CHECKING:
    from firstsight.starting.records import Found


@dataclass(frozen=True)
class Chosen:
    """Hold the choices, what was found in the data, and the preset that they start from."""

    choices: Choices
    found: "Found"
    preset: Path


def choose(given: Given, ask: ModuleType | None) -> Chosen:
    """Return the choices, after the records have been read and shown.

    Args:
        ask: the module `questions`; None: nothing can be asked, and nothing is missing in `given`.

    Raises:
        UserError: a flag, or the data that flags name, cannot be used.
        KeyboardInterrupt: the person ended the questions.
    """
    if given.approach is None:
        given = replace(given, approach=ask.approach())
        given.check()
    method = given.method or (ask.method() if ask else "lora")
    teacher = given.teacher or (ask.model("teacher", None) if given.approach == "distill" else None)
    student = given.student or ask.model("student", teacher)
    draft = Choices(given.approach, method, teacher, student, given.data or "", {})
    chosen = _look(draft, given.data, given, ask) if given.data else _ask_for_data(draft, given, ask)
    train = settings.load_preset(chosen.preset).train
    temperature, alpha = given.temperature, given.alpha
    if teacher:
        temperature = _or_asked(temperature, train.temperature, ask and ask.temperature)
        alpha = _or_asked(alpha, train.alpha, ask and ask.alpha)
    there = chosen.found.counts["train"]
    if given.samples:
        samples = check_samples(given.samples)
    else:
        samples = _or_asked(None, TRIAL if there > TRIAL else None, ask and (lambda _: ask.samples(there)))
    return replace(chosen, choices=replace(chosen.choices, temperature=temperature, alpha=alpha, samples=samples))


def _or_asked(given: Any, default: Any, ask: Callable[[Any], Any] | None) -> Any:
    """Return what is given, else what a person answers to whom `default` is offered, else `default`."""
    if given is not None:
        return given
    return ask(default) if ask else default


def _ask_for_data(draft: Choices, given: Given, ask: ModuleType) -> Chosen:
    """Ask for data, and again while they cannot be used."""
    while True:
        try:
            return _look(draft, ask.data(), given, ask)
        except UserError as error:
            screen.error(str(error))


def _look(draft: Choices, name: str, given: Given, ask: ModuleType | None) -> Chosen:
    """Read the data called `name` and show what was found.

    Raises:
        UserError: the data cannot be read, or do not suit the models.
    """
    with screen.console.status("Loading what reads data ..."):
        # Imported here: readers and models take seconds to import, and the first questions need none of them.
        from firstsight.starting import records, sources
    keys = sources.data_keys(name, given, ask and ask.column)
    choices = replace(draft, given_data=name, data=keys, options=sources.options(keys, given))
    with screen.console.status(f"Reading {name} ..."):
        asked = records.read(_data(settings.preset(choices, has_media=True), keys))
        preset = settings.preset(choices, has_media=any(one.media for one in asked))
        found = records.look(name, asked, _data(preset, keys))
        _check_fit(choices, found)
    screen.records(name, found)
    return Chosen(choices, found, preset)


def _data(preset: Path, keys: dict[str, Any]) -> Data:
    """Return the section `data` of a preset with other `keys`."""
    try:
        return Data.model_validate(settings.load_preset(preset).data.model_dump() | keys)
    except ValidationError as error:
        raise UserError(f"data.{describe(error)}") from None


def _check_fit(choices: Choices, found: "Found") -> None:
    """Raise UserError if records need a teacher that is not there, or a model of text alone is to see images."""
    if found.unanswered and not choices.teacher:
        raise UserError(
            f"{choices.given_data}: expected an answer to every question, found {found.unanswered:,} without one; add "
            "answers, or distil, so that the teacher gives them"
        )
    from firstsight.planning.shapes import on_meta  # as in `_look`
    from firstsight.planning.workload import reads_text_alone

    for source in filter(None, (choices.teacher, choices.student)) if found.has_media else ():
        try:
            blind = reads_text_alone(on_meta(Model(source=source, revision=None, init=None)).config)
        except UserError:
            continue  # not known before it is downloaded; the stage check-inputs looks again
        if blind:
            raise UserError(
                f"{choices.given_data}: expected text alone, because {source} reads no images, found images or video; "
                "choose other data, or a model that sees"
            )
