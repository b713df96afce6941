"""Write the choices into a preset, with its comments, and put the result in the place of params.yaml."""

import io
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from firstsight.core import params
from firstsight.core.errors import UserError
from firstsight.core.faults import writing
from firstsight.core.params import PARAMS_FILE, Params
from firstsight.records.sample import SPLITS
from firstsight.starting.choices import DEMOS, EMBEDDED, TESTED, Choices

if TYPE_CHECKING:
    from firstsight.starting.records import Found

FOLDER = Path("presets")
# As adapters have it in the presets that train them: one that trains all weights has less.
ADAPTER_RATE = 2e-4
_REVISION = "branch, tag or commit of the hub repository; null: its main branch"


class _Representer(RoundTripRepresenter):
    """Write null as `null`, as the presets do, and not as nothing."""

    def represent_none(self, data: None) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(type(None), _Representer.represent_none)


def _yaml() -> YAML:
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.preserve_quotes = True
    yaml.width = 1 << 20  # lines stay as long as they are
    return yaml


def preset(choices: Choices, has_media: bool, encodes: bool = False) -> Path:
    """Return the preset that the choices start from.

    It follows from the embedded models, images and videos in the data, and the kind of records; for classes also from
    whether the student is an encoder, which `encodes` says.
    """
    if choices.student == EMBEDDED.student:
        return FOLDER / ("text-smoke.yaml" if choices.kind == "class" else "smoke.yaml")
    if has_media:
        return FOLDER / "qwen2-vl-7b-24gb.yaml"
    if choices.kind == "class":
        return FOLDER / ("dbpedia-bert-tiny.yaml" if encodes else "dbpedia-qwen.yaml")
    if choices.kind == "text":
        return FOLDER / "wikitext-gpt2.yaml"
    return FOLDER / ("distill-gpt2.yaml" if choices.approach == "distill" else "finetune-gpt2-lora.yaml")


def load_preset(path: Path) -> Params:
    """Return the validated values of a preset.

    Raises:
        UserError: the file is missing.
    """
    if not path.is_file():
        raise UserError(f"{path}: expected a preset, found none; run firstsight start in the root of the repository")
    return params.load(path)


def with_choices(path: Path, choices: Choices, found: "Found") -> str:
    """Return the text of the preset `path`, comments included, with the choices in the place of its own values."""
    document = _yaml().load(path)
    models, data, train = document["models"], document["data"], document["train"]
    if choices.teacher is None:
        _leave_teacher_out(document)
    else:
        _set_model(models["teacher"], choices.teacher)
        _set(train, temperature=choices.temperature, alpha=choices.alpha)
        if found.unanswered:
            _set(data, unanswered="teacher")
        if choices.teacher == EMBEDDED.teacher and data_are_scenes(choices):
            _set(document["finetune_teacher"], enabled=False)  # it was trained on such scenes
    _set_model(models["student"], choices.student)
    _set(data, **{"hub": None} | choices.data, **limits(choices.samples, found.counts))
    if choices.kind == "class":
        _score_classes(document)
    if choices.method != "full" and train["method"] == "full":
        _set(train, learning_rate=max(train["learning_rate"], ADAPTER_RATE))
    _set(train, method=choices.method)
    document.yaml_set_start_comment(
        f"{_title(choices)}. Made from {path.as_posix()} by\n{shlex.join(choices.arguments())}\n\n"
    )
    text = io.StringIO()
    _yaml().dump(document, text)
    return text.getvalue()


def data_are_scenes(choices: Choices) -> bool:
    """Return whether the data are the rendered scenes of the demo."""
    return choices.data == DEMOS["scenes"].keys


def limits(samples: int | None, counts: dict[str, int]) -> dict[str, int | None]:
    """Return the keys of `data` that limit each split for a trial of `samples` training records; None limits none.

    Validation and test take a tenth as many, and at least `TESTED`. A split that has no more is taken whole (null).
    """
    if samples is None:
        return dict.fromkeys(f"{split}_samples" for split in SPLITS)
    held_out = max(TESTED, samples // 10)
    wanted = {"train": samples, "validation": held_out, "test": held_out}
    return {f"{split}_samples": number if number < counts[split] else None for split, number in wanted.items()}


@contextmanager
def beside(text: str) -> Iterator[Path]:
    """Yield a file with `text` next to params.yaml, valid and not yet in its place; it is gone when the block ends.

    Raises:
        UserError: a value is wrong, or the folder cannot be written to.
    """
    path = PARAMS_FILE.with_name(f".{PARAMS_FILE.name}.partial")
    try:
        with writing(path):
            path.write_text(text, encoding="utf-8")
        params.load(path)
        yield path
    finally:
        path.unlink(missing_ok=True)


def put_in_place(path: Path) -> Path | None:
    """Move the file `path` to params.yaml, whole or not at all, and return the copy that is kept of the old one.

    None is returned where there was no params.yaml, or one with the same content.
    """
    kept = None
    if PARAMS_FILE.exists() and PARAMS_FILE.read_bytes() != path.read_bytes():
        names = (PARAMS_FILE.with_name(f"{PARAMS_FILE.name}.{number}.bak") for number in count(1))
        kept = next(name for name in names if not name.exists())
        shutil.copy2(PARAMS_FILE, kept)
    path.replace(PARAMS_FILE)
    return kept


def _title(choices: Choices) -> str:
    """Return a line that says what the file is for."""
    what, method = choices.given_data, choices.method
    if choices.teacher:
        return f"Distil {choices.teacher} into {choices.student} ({method}) on {what}"
    return f"Fine-tune {choices.student} ({method}) on {what}"


def _set(section: CommentedMap, **values: Any) -> None:
    """Set values of a section, whose comments then follow them after one space. Lists are in one line."""
    section.update({key: _written(value) for key, value in values.items()})
    for key in values.keys() & section.ca.items.keys():
        section.ca.items[key][2].start_mark.column = 0


def _written(value: Any) -> Any:
    """Return a value in the form in which presets have it."""
    if isinstance(value, list):
        line = CommentedSeq(value)
        line.fa.set_flow_style()
        return line
    return DoubleQuotedScalarString(value) if isinstance(value, str) and "\n" in value else value


def _set_model(section: CommentedMap, source: str) -> None:
    """Name another model in a section of `models`, whose revision is that of the preset's model alone."""
    if section["source"] != source:
        _set(section, source=source, revision=None, init=None)
        section.yaml_add_eol_comment(_REVISION, "revision", column=0)


def _score_classes(document: CommentedMap) -> None:
    """Set what comparing over classes asks for, where a preset is for other records."""
    _set(document["targets"], over="classes", kind="hidden")
    _set(document["train"], best="accuracy")
    _set(document["export"], formats=[], teacher=False)


def _leave_teacher_out(document: CommentedMap) -> None:
    """Set what `models.teacher: null` asks for, where a preset has a teacher."""
    if document["models"]["teacher"] is None:
        return
    _set(document["models"], teacher=None)
    _set(document["train"], alpha=0.0)
    _set(document["finetune_teacher"], enabled=False)
    _set(document["data"], unanswered="refuse", labelled_fraction=1.0)
    _set(document["export"], formats=[], teacher=False)
    _set(document["evaluate"], teacher_methods=[])
