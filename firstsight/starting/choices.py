"""What a run is made of: the choices of `firstsight start`, the models and demos that it suggests, and their checks."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import TypeAdapter, ValidationError

from firstsight.core.classes import template_columns
from firstsight.core.errors import UserError
from firstsight.core.params import Data, FileSource, Model, Train
from firstsight.core.validation import describe

Approach = Literal["finetune", "distill"]
Method = Literal["lora", "qlora", "adalora", "full"]
# What each record is: a question with its answer, one of a few classes, or a text that nothing is asked about.
Kind = Literal["question", "class", "text"]

APPROACHES: dict[Approach, str] = {
    "finetune": "Fine-tune a model on your data",
    "distill": "Distil a teacher into a smaller student",
}
METHODS: dict[Method, str] = {
    "lora": "small adapters beside frozen weights, merged when training ends",
    "qlora": "the same over weights in 4 bits (NF4): the least GPU memory",
    "adalora": "LoRA that moves its rank to the layers that need it",
    "full": "all weights are trained: the most GPU memory",
}

KINDS: dict[Kind, str] = {
    "question": "each with its answer",
    "class": "each record is of one of a few",
    "text": "which nothing is asked about",
}

# What the two numbers of distilling do, in one line each.
TEMPERATURE = "T softens what the teacher says: above 1, its second choices count for more."
ALPHA = "Alpha is the teacher's weight: 0 learns from the data's answers alone, 1 from the teacher."

# What is asked of classes, and of texts, in one line each.
PROMPT = r"The prompt asks for a record's class. {column} stands for what the record has there, \n for a new line."
MAX_TOKENS = "Longer texts are cut to so many tokens: time and memory grow with them."

# Records that a trial is trained on where Enter is pressed, and that a limited split is tested on at least.
TRIAL, TESTED = 200, 100

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Pair:
    """Suggest a teacher and a student; `reads` says what they are asked about.

    They share their vocabulary, unless they are compared over classes.
    """

    teacher: str
    student: str
    sizes: tuple[str, str]
    reads: str


PAIRS = (
    Pair("openai-community/gpt2-medium", "openai-community/gpt2", ("355 M", "124 M"), "text"),
    Pair("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", ("1.5 B", "0.5 B"), "text"),
    Pair("Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2-VL-2B-Instruct", ("8.3 B", "2.2 B"), "images, video and text"),
    Pair(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "google/bert_uncased_L-2_H-128_A-2",
        ("1.8 B", "4.4 M"),
        "text of a few classes, which the student, an encoder, tells apart",
    ),
    Pair("embedded/teacher", "embedded/student", ("2.0 M", "0.5 M"), "the demo's scenes; in minutes on a CPU"),
)
EMBEDDED = PAIRS[-1]


@dataclass(frozen=True)
class Demo:
    """Suggest data: what they are, and the keys of the section `data` that name them."""

    title: str
    keys: dict[str, Any]


DEMOS = {
    "scenes": Demo("rendered first-person scenes, images and clips, made on this machine", {"source": "synthetic"}),
    "sciq": Demo(
        "SciQ: science questions with short answers, text, from the hub",
        {
            "source": "hub",
            "hub": {
                "id": "allenai/sciq",
                "config": None,
                "revision": None,
                "splits": {"train": "train", "validation": "validation", "test": "test"},
                "fields": {"question": "question", "answer": "correct_answer"},
            },
        },
    ),
    "wikitext": Demo(
        "WikiText-2: paragraphs of Wikipedia, texts that nothing is asked about, from the hub",
        {
            "source": "hub",
            "hub": {
                "id": "Salesforce/wikitext",
                "config": "wikitext-2-raw-v1",
                "revision": None,
                "splits": {"train": "train", "validation": "validation", "test": "test"},
                "fields": {"text": "text"},
            },
        },
    ),
    "classes": Demo(
        "120 sentences of three classes: animals, plants and vehicles", {"source": "csv", "path": "data/classes.csv"}
    ),
}

# The names under which data sets publish their annotation files, and the form that a suffix stands for otherwise.
_PUBLISHED: dict[str, FileSource] = {
    "questions.json": "egoschema",
    "open-eqa-v0.json": "openeqa",
    "egotempo_openQA.json": "egotempo",
}
_SUFFIXES: dict[str, FileSource] = {
    ".jsonl": "jsonl",
    ".csv": "csv",
    ".txt": "text",
    ".json": "llava",
    ".parquet": "llava",
}


@dataclass(frozen=True)
class Given:
    """Hold what flags have answered; None, or nothing in `fields`, is not answered.

    `source` is the form of a file; `config` and `fields` are of a data set of the hub, see `sources.layout`.
    `prompt` is of records of a class, and `max_tokens` of texts.
    """

    approach: Approach | None = None
    method: Method | None = None
    teacher: str | None = None
    student: str | None = None
    data: str | None = None
    source: FileSource | None = None
    config: str | None = None
    fields: tuple[str, ...] = ()
    prompt: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    alpha: float | None = None
    samples: str | None = None

    def missing(self) -> list[str]:
        """Return the flags that are needed where nothing can be asked, and are not there."""
        needed = {"--approach": self.approach, "--student": self.student, "--data": self.data}
        if self.approach == "distill":
            needed["--teacher"] = self.teacher
        return [flag for flag, value in needed.items() if value is None]

    def check(self) -> None:
        """Raise UserError if a value is wrong, or needs a teacher where there is none."""
        for model in filter(None, (self.teacher, self.student)):
            check_model(model)
        for key, number in (("temperature", self.temperature), ("alpha", self.alpha)):
            if number is not None:
                check_number(key, str(number))
        if self.prompt is not None:
            check_prompt(self.prompt)
        if self.max_tokens is not None:
            check_max_tokens(str(self.max_tokens))
        if self.samples is not None:
            check_samples(self.samples)
        for flag in ("teacher", "temperature", "alpha"):
            if self.approach == "finetune" and (found := getattr(self, flag)) is not None:
                raise UserError(f"--{flag}: expected it with --approach distill alone, found {found}; leave it out")


@dataclass(frozen=True)
class Choices:
    """Hold everything that a person chooses.

    `data` holds the keys of the section `data` that say where the records are and how they are read, `given_data` the
    words that named them, `kind` what they are.
    `temperature` and `alpha` are None where there is no teacher. `samples` is the number of training records; None
    takes all. `options` are further words of the command line that the data need.
    """

    approach: Approach
    method: Method
    teacher: str | None
    student: str
    given_data: str
    data: dict[str, Any]
    temperature: float | None = None
    alpha: float | None = None
    samples: int | None = None
    options: tuple[str, ...] = ()
    kind: Kind = "question"

    def arguments(self) -> list[str]:
        """Return the words of the command that makes the same choices without asking for any of them."""
        words = ["firstsight", "start", "--approach", self.approach, "--method", self.method]
        words += ["--teacher", self.teacher] if self.teacher else []
        words += ["--student", self.student, "--data", self.given_data, *self.options]
        if self.approach == "distill":
            words += ["--temperature", f"{self.temperature:g}", "--alpha", f"{self.alpha:g}"]
        return [*words, "--samples", str(self.samples or "all")]


def check_model(source: str) -> str:
    """Return the source of a model, which is a folder with a config.json or has the form of a hub id.

    Raises:
        UserError: it is neither, or a folder that a stage replaces.
    """
    try:
        Model(source=source, revision=None, init=None)
    except ValidationError as error:
        raise UserError(f"{source or 'model'}: {describe(error)}") from None
    if Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            raise UserError(f"{source}: expected a model's folder with a config.json, found none in it; name another")
    elif not _HUB_ID.fullmatch(source):
        raise UserError(f"{source}: expected a folder, or a hub id as owner/name, found neither; correct it")
    return source


def check_number(key: Literal["temperature", "alpha"], text: str) -> float:
    """Return the number that `text` gives for `train.temperature` or `train.alpha`.

    Raises:
        UserError: it is no number, or out of the range of params.yaml.
    """
    try:
        return TypeAdapter(Annotated[float, *Train.model_fields[key].metadata]).validate_python(float(text))
    except ValidationError as error:
        raise UserError(f"{key}: {describe(error)}") from None
    except ValueError:
        raise UserError(f"{key}: expected a number, found {text!r}; correct it") from None


def check_prompt(text: str) -> str:
    """Return the template that `text` gives for `data.prompt`, in which `\\n` stands for a line feed.

    Raises:
        UserError: it names no column.
    """
    template = text.replace("\\n", "\n")
    try:
        template_columns(template)
    except ValueError as error:
        raise UserError(f"prompt: {error}") from None
    return template


def typed(template: str) -> str:
    """Return the text by which `check_prompt` gives a template, in one line."""
    return template.replace("\n", "\\n")


def check_max_tokens(text: str) -> int:
    """Return the number that `text` gives for `data.max_tokens`.

    Raises:
        UserError: it is no whole number, or out of the range of params.yaml.
    """
    try:
        TypeAdapter(Data.model_fields["max_tokens"].annotation).validate_python(int(text))
    except ValidationError as error:
        raise UserError(f"max-tokens: {describe(error)}") from None
    except ValueError:
        raise UserError(f"max-tokens: expected a whole number, found {text!r}; correct it") from None
    return int(text)


def check_samples(text: str) -> int | None:
    """Return the number of training records that `text` asks for; None for "all".

    Raises:
        UserError: it is neither "all" nor a whole number above 0.
    """
    if text == "all":
        return None
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise UserError(f"samples: expected a whole number above 0, or all, found {text!r}; correct it")
    return int(text)


def is_hub_data(name: str) -> bool:
    """Return whether data are named by a hub id or a folder, and not by an annotation file or a demo."""
    if name in DEMOS or Path(name).is_file():
        return False
    return Path(name).is_dir() or (_HUB_ID.fullmatch(name) is not None and Path(name).suffix not in _SUFFIXES)


def file_form(path: str) -> FileSource:
    """Return the form of an annotation file, by its name.

    Raises:
        UserError: the name says nothing of the form.
    """
    form = _PUBLISHED.get(Path(path).name) or _SUFFIXES.get(Path(path).suffix.lower())
    if form is None:
        raise UserError(
            f"{path}: expected a demo ({', '.join(DEMOS)}), a hub id as owner/name, or a file that ends in "
            f"{', '.join(_SUFFIXES)}, found none of them; correct it, or say what form the file has with --source"
        )
    return form
