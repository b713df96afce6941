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
from firstsight.starting.choices import TRIAL, Choices, Given, Kind, check_prompt, check_samples

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from firstsight.starting.records import Found
    from firstsight.starting.sources import Layout


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
    if chosen.choices.kind == "text":
        chosen = _cut(chosen, given, ask)
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
        from firstsight.models.architecture import is_encoder
        from firstsight.readers.problems import Problems
        from firstsight.starting import records, sources
    layout = sources.layout(name, given, ask)
    _check_flags(name, given, layout.kind)
    keys = layout.keys | ({"prompt": _prompt(name, given, layout, ask)} if layout.kind == "class" else {})
    choices = replace(draft, given_data=name, kind=layout.kind, options=sources.options(keys, name, given))
    problems = Problems("stop")
    with screen.console.status(f"Reading {name} ..."):
        data = _data(settings.preset(choices, has_media=True), keys)
        if layout.kind == "class":
            asked, classes = records.read_classes(name, data, problems)
            keys |= {"classes": [*classes]}
        else:
            asked = records.read(data, problems)
        has_media, student = any(one.media for one in asked), _config(choices.student)
        preset = settings.preset(choices, has_media, encodes=student is not None and is_encoder(student.model_type))
        found = records.look(name, asked, _data(preset, keys), problems)
        choices = replace(choices, data=keys)
        _check_fit(choices, found)
    screen.records(name, found)
    return Chosen(choices, found, preset)


def _check_flags(name: str, given: Given, kind: Kind) -> None:
    """Raise UserError if a flag has answered what is not asked of such records."""
    for flag, asked_of, value in (("prompt", "class", given.prompt), ("max-tokens", "text", given.max_tokens)):
        if value is not None and kind != asked_of:
            whose = {"class": "records of a class", "text": "texts", "question": "questions"}
            raise UserError(
                f"--{flag}: expected it with {whose[asked_of]} alone, found {whose[kind]} in {name}; leave it out"
            )


def _prompt(name: str, given: Given, layout: "Layout", ask: ModuleType | None) -> str:
    """Return the template that asks for a record's class."""
    if given.prompt is not None:
        return check_prompt(given.prompt)
    if ask:
        return ask.prompt(layout.columns, layout.prompt())
    if (template := layout.prompt()) is None:
        raise UserError(
            f"{name}: expected a column of text beside the class, found {[*layout.columns]}; say what is asked with "
            "--prompt"
        )
    return template


def _cut(chosen: Chosen, given: Given, ask: ModuleType | None) -> Chosen:
    """Return the choices with the most tokens of a text, at first as many as the models have positions for."""
    from firstsight.starting import records  # as in `_look`

    choices = chosen.choices
    sizes = [
        getattr(_config(source), "max_position_embeddings", None)
        for source in (choices.teacher, choices.student)
        if source
    ]
    default = min(size for size in (settings.load_preset(chosen.preset).data.max_tokens, *sizes) if size)
    most = _or_asked(given.max_tokens, default, ask and ask.max_tokens)
    options = (*choices.options, "--max-tokens", str(most))
    choices = replace(choices, data=choices.data | {"max_tokens": most}, options=options)
    return replace(chosen, choices=choices, found=records.cut(chosen.found, most))


def _data(preset: Path, keys: dict[str, Any]) -> Data:
    """Return the section `data` of a preset with other `keys`."""
    try:
        return Data.model_validate(settings.load_preset(preset).data.model_dump() | keys)
    except ValidationError as error:
        found = describe(error)  # of one key, or of several together
        raise UserError(f"data{': ' if found.startswith('expected') else '.'}{found}") from None


def _config(source: str) -> "PretrainedConfig | None":
    """Return the config of a model; None if it is not known before the model is downloaded."""
    from firstsight.planning.shapes import on_meta  # as in `_look`

    try:
        return on_meta(Model(source=source, revision=None, init=None)).config
    except UserError:
        return None


def _check_fit(choices: Choices, found: "Found") -> None:
    """Raise UserError if records need a teacher that is not there, or models cannot read such records.

    Of a model that is not known before it is downloaded, the stage check-inputs says it.
    """
    if found.unanswered and not choices.teacher:
        raise UserError(
            f"{choices.given_data}: expected an answer to every question, found {found.unanswered:,} without one; add "
            "answers, or distil, so that the teacher gives them"
        )
    from firstsight.models.architecture import is_encoder  # as in `_look`
    from firstsight.planning.workload import reads_text_alone

    for source in filter(None, (choices.teacher, choices.student)):
        if (config := _config(source)) is None:
            continue
        encodes, blind = is_encoder(config.model_type), reads_text_alone(config)
        if found.has_media and blind:
            raise UserError(
                f"{choices.given_data}: expected text alone, because {source} reads no images, found images or video; "
                "choose other data, or a model that sees"
            )
        if encodes and choices.kind != "class":
            raise UserError(
                f"{choices.given_data}: expected records of a class, because {source} is an encoder, which gives no "
                "text, found others; choose other data, or a causal language model"
            )
        if choices.kind == "text" and not blind:
            raise UserError(
                f"{choices.given_data}: expected questions, because {source} is a vision-language model, found texts; "
                "choose other data, or a causal language model"
            )
