"""params.yaml as typed, validated classes: one class for each section, one section for each stage.

No parameter has a default: a run does what its params.yaml says, and two runs differ only where their files do. `load`
checks the whole file at once, so that a mistake under `evaluate` is reported before a teacher is trained.
"""

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from firstsight.core import yaml12
from firstsight.core.classes import classes_apart, template_columns
from firstsight.core.errors import UserError
from firstsight.core.validation import mistakes

PARAMS_FILE = Path("params.yaml")

# Keys that had another name in earlier versions, with the section that holds them, and their names now.
RENAMED = {
    "adapter.alpha": "lora_alpha",
    "adapter.targets": "target_modules",
    "init.tied_head": "tie_word_embeddings",
    "init.vocabulary_rows": "embedding_rows",
    "init.words": "vocabulary_size",
}

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Batch = Annotated[int, Field(ge=1, le=65_536)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Method = Literal["int8", "nf4", "int4"]
Precision = Literal[Dtype, Method]
Format = Literal["onnx", "onnx-int8", "onnx-w4a8"]
ClassScores = Literal["sum", "mean", "calibrated"]
# What runs exports: first on the CPU, where they can be measured, then what only commands take.
CpuEngine = Literal["onnxruntime", "openvino"]
Engine = Literal[CpuEngine, "onnxruntime-cuda", "onnxruntime-tensorrt"]

# Folders of models/ that stages write, and therefore replace or remove.
MODEL_OUTPUTS = (
    *("teacher", "teacher-finetuned", "teacher-onnx", "student", "student-finetuned", "student-distilled"),
    *(f"student-{name}" for name in (*get_args(Method), *get_args(Format))),
)


def _distinct(values: list) -> list:
    if len(set(values)) < len(values):
        raise ValueError(f"expected each value once, found {values}")
    return values


Methods = Annotated[list[Method], AfterValidator(_distinct)]


def _template(template: str) -> str:
    template_columns(template)
    return template


class Section(BaseModel):
    """Hold the known keys of a section; refuse numbers written as text, and fractions where a count is expected."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Initialisation(Section):
    """Describe a new Qwen2-VL: sizes of its language model and vision tower, and of the tokenizer trained for it.

    `vocabulary_size` counts the tokens that the tokenizer learns, to which its special tokens are added.
    `embedding_rows` is the number of rows of embedding and head: at least one a token, and more in the hub's models.
    With `tie_word_embeddings` both are one weight.
    `initializer_range` is the standard deviation of the random weights; small widths need more than Qwen's 0.02.
    """

    seed: Seed
    corpus: str
    vocabulary_size: Annotated[int, Field(ge=256)]
    embedding_rows: Annotated[int, Field(ge=270)]
    tie_word_embeddings: bool
    hidden_size: Count
    intermediate_size: Count
    layers: Count
    heads: Count
    kv_heads: Count
    initializer_range: Positive
    vision_hidden_size: Count
    vision_layers: Count
    vision_heads: Count
    max_pixels: Annotated[int, Field(ge=4 * 28 * 28)]

    @model_validator(mode="after")
    def _shapes_fit(self) -> "Initialisation":
        # Rotary embeddings split a head in three even parts (text) or four (vision).
        for whole, part, factor in (("hidden_size", "heads", 16), ("vision_hidden_size", "vision_heads", 4)):
            if getattr(self, whole) % (factor * getattr(self, part)):
                raise ValueError(
                    f"expected {whole} to be a multiple of {factor} x {part}, "
                    f"found {getattr(self, whole)} with {getattr(self, part)} heads"
                )
        if self.heads % self.kv_heads:
            raise ValueError(f"expected heads to be a multiple of kv_heads, found {self.heads} and {self.kv_heads}")
        return self


class Model(Section):
    """Say where a model comes from: `init` (random weights, sizes under `init`), a local folder, or a hub id.

    `revision` is a branch, tag or commit of the hub repository; what it resolved to is recorded with the model.
    """

    source: Annotated[str, Field(min_length=1)]
    revision: str | None
    init: Initialisation | None

    @model_validator(mode="after")
    def _source_usable(self) -> "Model":
        if self.source == "init" and self.init is None:
            raise ValueError("expected sizes under init, because source is 'init', found null")
        outputs = [Path("models", name).resolve() for name in MODEL_OUTPUTS]
        here = Path(self.source).resolve()
        if any(output in (here, *here.parents) for output in outputs):
            raise ValueError(
                f"expected a source outside the pipeline's own outputs, found {self.source}, which a stage replaces; "
                "move or copy the model to another folder and name that"
            )
        return self


class Models(Section):
    """Name both models; without a teacher (null), the student is fine-tuned on the labels alone."""

    teacher: Model | None
    student: Model


# The question types of rendered scenes: those with dense answers, which describe a whole scene, then the templates'.
DenseType = Literal["description", "inventory", "narration"]
TemplateType = Literal[
    "held object",
    "position",
    "colour",
    "count",
    "comparison",
    "presence",
    "what changed",
    "order of events",
    "unanswerable",
]
TEMPLATE_TYPES: tuple[str, ...] = get_args(TemplateType)


class Synthetic(Section):
    """Configure rendered scenes: how many there are, and what is asked about each.

    `types` are the question types that are asked. Of the dense types (`DenseType`), all questions are asked about each
    scene; of the other types, `questions_per_scene` questions. The share
    `clip_fraction` of the scenes are clips of 2 to `max_clip_frames` frames, the others are images. Of the questions
    that can have options, the share `option_fraction` has them.
    """

    scenes: Count
    questions_per_scene: Count
    types: Annotated[list[DenseType | TemplateType], Field(min_length=1), AfterValidator(_distinct)]
    clip_fraction: Fraction
    max_clip_frames: Annotated[int, Field(ge=4, le=8)]
    option_fraction: Fraction


FileSource = Literal["jsonl", "csv", "llava", "egoschema", "openeqa", "egotempo", "text"]


class Hub(Section):
    """Name a data set of the hub, or a local folder of one, by `id`, `config` and `revision`.

    `splits` maps its splits to ours; `fields` maps our names (question, answer, options, text, image, video, id, ...)
    to its columns.
    """

    id: str
    config: str | None
    revision: str | None
    splits: dict[str, Literal["train", "validation", "test", "by group"]]
    fields: dict[str, str]


class Benchmark(Section):
    """Name a second file whose records all go to the test split; the training split uses none of their media."""

    source: Literal["none", FileSource]
    path: Annotated[str, Field(min_length=1)]
    media_root: str | None


class Data(Section):
    """Say where questions come from: rendered scenes (`synthetic`), the file `path` in one of several formats, the hub.

    Where each record has one of a few classes, `classes` has their names, which are the answers; the record's key
    `class` names its own. (Of a column of datasets' type ClassLabel that data.hub.fields maps to `class`, null takes
    the names.) `prompt` is a template of the question, with the names of the file's columns in braces; null: the
    question is in the column `question`.

    `path` and `benchmark.path` must exist whatever the source, because the stage depends on them. Images and videos are
    read from `media_root` (null: the folder of the file) alone.

    A record that cannot be used ends the build (`on_error: stop`) or is counted and listed (`skip`). A question without
    an answer counts as such a record (`unanswered: refuse`) or gets the teacher's answer (`teacher`). Of the groups of
    the training split, the share `labelled_fraction` keeps its answers; questions of the others count as unanswered.

    Splits are made by group. `train_samples`, `validation_samples` and `test_samples` limit a split to that many
    records, in the proportions of the question types, or of the classes; null takes all. Question types in
    `train_only_types` are left out of the test split. Texts, which nothing is asked about, are cut to `max_tokens`
    tokens where they are encoded, the begin token among them (null: they are not cut). Frames are sampled at `fps`, at
    most `max_frames` a video, and scaled to at most `max_pixels`.
    """

    source: Literal["synthetic", "hub", FileSource]
    path: Annotated[str, Field(min_length=1)]
    media_root: str | None
    hub: Hub | None
    benchmark: Benchmark
    synthetic: Synthetic
    on_error: Literal["stop", "skip"]
    unanswered: Literal["refuse", "teacher"]
    labelled_fraction: Fraction
    classes: Annotated[list[str], AfterValidator(classes_apart)] | None
    prompt: Annotated[str, AfterValidator(_template)] | None
    seed: Seed
    validation_fraction: Fraction
    test_fraction: Fraction
    train_samples: Count | None
    validation_samples: Count | None
    test_samples: Count | None
    train_only_types: list[str]
    max_tokens: Annotated[int, Field(ge=2)] | None
    fps: Positive
    max_frames: Annotated[int, Field(ge=2)]
    max_pixels: Annotated[int, Field(ge=4 * 28 * 28)]
    jpeg_quality: Annotated[int, Field(ge=1, le=100)]

    @model_validator(mode="after")
    def _complete(self) -> "Data":
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                "expected validation_fraction + test_fraction below 1, found "
                f"{self.validation_fraction + self.test_fraction:g}"
            )
        if self.labelled_fraction < 1 and self.unanswered == "refuse":
            raise ValueError(
                "expected unanswered: teacher, because labelled_fraction is below 1, found unanswered: refuse"
            )
        if self.source == "hub" and self.hub is None:
            raise ValueError("expected a data set under hub, because source is 'hub', found null")
        for key in ("classes", "prompt"):
            others = {self.source, self.benchmark.source} - {"jsonl", "csv", "hub", "none"}
            if others and getattr(self, key) is not None:
                raise ValueError(
                    f"expected jsonl, csv or hub as source, because {key} is set, found {min(others)}; "
                    f"set {key} to null"
                )
        return self

    @model_validator(mode="after")
    def _prompt_tells_no_answer(self) -> "Data":
        fields = self.hub.fields if self.source == "hub" and self.hub else {}
        # Where there are classes, a column called answer is like any other.
        keys = ("class",) if self.classes or "class" in fields else ("answer", "answers")
        told = {fields.get(key, key) for key in keys}
        named = template_columns(self.prompt) if self.prompt else []
        if leaks := [name for name in named if name in told]:
            raise ValueError(
                f"expected a prompt without the column that has the answer, found {{{leaks[0]}}}; take it out of prompt"
            )
        return self


class Adapter(Section):
    """Configure peft's low-rank adapters: `rank`, scale `lora_alpha / rank`, on modules named in `target_modules`.

    null takes all linear layers of the language model but the head, whatever the architecture calls them.
    """

    rank: Count
    lora_alpha: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: Annotated[list[str], Field(min_length=1)] | None


class Optimisation(Section):
    """Configure AdamW with linear warm-up and cosine decay, gradients clipped at `max_grad_norm`.

    `optimizer` says how AdamW keeps its two moments of each weight: in float32 (adamw), or in 8 bits (adamw_8bit).

    A step takes `batch_size x gradient_accumulation_steps` samples, each with all its questions, whatever the number
    of processes. `gradient_checkpointing` computes activations twice instead of storing them. When memory runs out,
    `auto_batch` makes micro-batches smaller and takes more of them for each step.

    `method` says what is trained: all weights (full), or adapters over frozen weights (lora, adalora) or over frozen
    NF4 weights (qlora). Without `train_vision`, the vision tower and its projector are frozen.
    """

    method: Literal["full", "lora", "qlora", "adalora"]
    train_vision: bool
    adapter: Adapter

    epochs: Annotated[float, Field(gt=0, le=10_000)]
    batch_size: Batch
    gradient_accumulation_steps: Batch
    gradient_checkpointing: bool
    auto_batch: bool
    optimizer: Literal["adamw", "adamw_8bit"]
    learning_rate: Positive
    warmup_fraction: Fraction
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    max_grad_norm: Positive
    seed: Seed

    @property
    def caches_visual_tokens(self) -> bool:
        """Return whether training reads the vision tower's outputs from disk, and does without the tower."""
        return False


class FinetuneTeacher(Optimisation):
    """Configure supervised fine-tuning of the teacher on the train split; `enabled: false` leaves it out."""

    enabled: bool


class Targets(Section):
    """Say what is cached of the teacher for each answer token, and in which precision the teacher is loaded.

    `hidden` caches final hidden states, exactly; `topk` the `k` best logits, smaller and approximate; `online` nothing:
    the teacher runs during distillation. `k` matters to topk alone.
    The teacher answers questions that have no answer, in at most `max_answer_tokens` tokens.

    `over` says what the student's distribution is compared over: the vocabulary at each answer token (tokens), or, for
    records of a class, the classes (classes), of which a score each is cached, whatever `k` and `max_answer_tokens`.
    `class_scores` says how a teacher that is a language model scores them, here and where it is evaluated: by the sum
    of log-probabilities, by their mean over tokens, or calibrated (`firstsight.packing.forward`).
    """

    over: Literal["tokens", "classes"]
    class_scores: ClassScores
    kind: Literal["hidden", "topk", "online"]
    k: Count
    precision: Precision
    batch_size: Batch
    max_answer_tokens: Count

    @model_validator(mode="after")
    def _classes_are_cached(self) -> "Targets":
        if self.over == "classes" and self.kind != "hidden":
            raise ValueError(f"expected kind hidden, because over is classes, found {self.kind}")
        if self.over == "tokens" and self.class_scores != "sum":
            raise ValueError(f"expected class_scores sum, because over is tokens, found {self.class_scores}")
        return self


class Train(Optimisation):
    """Configure distillation: L = alpha T^2 D(teacher, student) + (1 - alpha) CE. `alpha` is the weight of the teacher.

    D is `divergence`; `jsd_beta`, between 0 and 1, is the weight of the teacher in jsd's mixture.
    The weights of the best epoch are kept: `best` says whether that is the one with the least validation objective, or,
    for targets over classes, with the highest validation accuracy. Training stops after `early_stopping_epochs` epochs
    without a better one. With `keep_final`, the weights of the last step are kept beside them.

    With a frozen vision tower (`train_vision: false`), `visual_tokens` says whether its outputs are made once and kept
    on disk (`cached`), or made in every epoch (`computed`).
    """

    visual_tokens: Literal["cached", "computed"]
    temperature: Annotated[float, Field(ge=0.01, le=1000)]
    alpha: Fraction
    divergence: Literal["forward_kl", "reverse_kl", "jsd"]
    jsd_beta: Annotated[float, Field(gt=0, lt=1)]
    early_stopping_epochs: Count
    best: Literal["objective", "accuracy"]
    keep_final: bool

    @property
    def caches_visual_tokens(self) -> bool:
        return not self.train_vision and self.visual_tokens == "cached"


class Control(Section):
    """Say whether the student is also trained without a teacher, on which answers, to show what distilling adds.

    `answers` are those of the data alone (`labels`), or also the teacher's to questions that have none (`teacher`).
    """

    enabled: bool
    answers: Literal["labels", "teacher"]


class Quantize(Section):
    """Configure quantization of the distilled student: each of `methods` makes a model, evaluated as a variant.

    For nf4, bitsandbytes also quantizes the scales with `double_quantization` (Dettmers et al., 2023,
    arXiv:2305.14314), and multiplies in `compute_dtype` (auto: the precision of the other weights). Weights of int4 are
    rounded by the tokens of `rounding_samples` samples of the train split; with 0, to the nearest. The error of each
    layer is measured on `calibration_samples` samples of the validation split.
    """

    methods: Methods
    double_quantization: bool
    compute_dtype: Dtype
    rounding_samples: NonNegativeInt
    calibration_samples: Count


class Export(Section):
    """Say which exports are made of the distilled student, and whether one is of the teacher, to compare them with.

    Each is a folder of ONNX graphs that onnxruntime runs without torch: with float32 weights (onnx), with those of all
    layers in 8 bits (onnx-int8), or in 4 bits (onnx-w4a8); of the last two, products are computed in int8. Weights in 4
    bits are rounded by the tokens of `calibration_samples` samples of the train split; with 0, to the nearest. The
    teacher is exported with float32 weights.
    """

    formats: Annotated[list[Format], AfterValidator(_distinct)]
    calibration_samples: NonNegativeInt
    teacher: bool


ASKED_TOKENS = 128


class Evaluate(Section):
    """Configure evaluation. Quality is measured on the whole test split, `batch_size` questions at a time.

    Answers have at most `max_new_tokens` tokens; null: as many as the longest true answer needs, and `ASKED_TOKENS`
    where a question has no true answer.

    Exports are run by `engine`, on the CPU.

    Of texts, which nothing is asked about, so many `continuations` are compared with how the texts go on, by ROUGE.

    95% intervals come from `bootstrap_samples` resamplings. The teacher is measured quantized, too, by each of
    `teacher_methods`. Speed is measured on `latency_runs` questions, each answered with exactly `latency_new_tokens`
    tokens: one at a time, and in batches of each of `throughput_batch_sizes`.
    """

    precision: Precision
    engine: CpuEngine
    teacher_methods: Methods
    batch_size: Batch
    max_new_tokens: Count | None
    continuations: NonNegativeInt
    bootstrap_samples: Annotated[int, Field(ge=100)]
    latency_runs: Count
    latency_new_tokens: Annotated[int, Field(ge=2)]
    throughput_batch_sizes: Annotated[list[Count], Field(min_length=1), AfterValidator(_distinct)]
    seed: Seed

    def asked_tokens(self) -> int:
        """Return the most tokens of an answer to a question that is not of the test split."""
        return self.max_new_tokens or ASKED_TOKENS


class Levels(Section):
    """Hold the values that a figure must reach for each verdict."""

    minimum: Positive
    target: Positive
    stretch: Positive

    @model_validator(mode="after")
    def _ascending(self) -> "Levels":
        if not self.minimum <= self.target <= self.stretch:
            raise ValueError(f"expected minimum <= target <= stretch, found {self!r}")
        return self


class Criteria(Section):
    """Hold the levels for each student made by distilling, see `firstsight.reporting.criteria`; null: not judged."""

    gain: Levels
    retention: Levels
    compression: Levels
    weights_saved: Levels
    speed_up: Levels | None


class Report(Section):
    criteria: Criteria


class Runtime(Section):
    """Say how stages run, which cannot change a result: no stage depends on it. `device: auto` is CUDA if available."""

    device: Literal["auto", "cpu", "cuda"]
    data_workers: Annotated[int, Field(ge=0)]


class Params(Section):
    """Hold the whole of params.yaml."""

    models: Models
    data: Data
    finetune_teacher: FinetuneTeacher
    targets: Targets
    train: Train
    control: Control
    quantize: Quantize
    export: Export
    evaluate: Evaluate
    report: Report
    runtime: Runtime

    @model_validator(mode="after")
    def _classes_named(self) -> "Params":
        hub = self.data.hub if self.data.source == "hub" else None
        named = self.data.classes is not None or "class" in (hub.fields if hub else {})
        if self.targets.over == "classes" and not named:
            raise ValueError(
                "targets.over: expected tokens, because data.classes is null, found classes; name the classes"
            )
        if self.targets.class_scores == "calibrated" and self.data.prompt is None:
            raise ValueError(
                "targets.class_scores: expected sum or mean, because data.prompt is null, and calibrating asks the "
                "template without a record's text, found calibrated; set it so, or make the questions by data.prompt"
            )
        if self.targets.class_scores != "sum" and self.export.teacher:
            raise ValueError(
                "export.teacher: expected false, because exports score classes by sums, and targets.class_scores is "
                f"{self.targets.class_scores}, found true"
            )
        if self.train.best == "accuracy" and self.targets.over != "classes":
            raise ValueError("train.best: expected objective, because targets.over is tokens, found accuracy")
        return self

    @model_validator(mode="after")
    def _without_a_teacher(self) -> "Params":
        if self.models.teacher is not None:
            return self
        asked = {
            "train.alpha": (self.train.alpha, 0),
            "finetune_teacher.enabled": (self.finetune_teacher.enabled, False),
            "data.unanswered": (self.data.unanswered, "refuse"),
            "targets.class_scores": (self.targets.class_scores, "sum"),
            "export.formats": (self.export.formats, []),
            "export.teacher": (self.export.teacher, False),
            "evaluate.teacher_methods": (self.evaluate.teacher_methods, []),
        }
        for key, (found, expected) in asked.items():
            if found != expected:
                raise ValueError(f"{key}: expected {expected!r}, because models.teacher is null, found {found!r}")
        return self


def load(path: Path = PARAMS_FILE) -> Params:
    """Read and validate the parameter file `path`.

    Raises:
        UserError: the file is missing or not a YAML mapping, or a value is wrong; one line that names the first wrong
            key, what was expected, what was found, and how many more mistakes there are.
    """
    try:
        values = yaml12.load(path)
    except FileNotFoundError:
        raise UserError(
            f"{path}: expected a parameter file, found none; run in the repository's root, "
            "or copy a file from presets/ to params.yaml"
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected sections ({', '.join(Params.model_fields)}), found {values!r}")
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {_describe(error)}") from None


_REMEDIES = {
    "missing": "; presets/ and params.yaml in git show the complete form",
    "extra_forbidden": "; check its spelling or remove it",
}


def _describe(error: ValidationError) -> str:
    """Return the first mistake as one line with its remedy, and how many more there are."""
    found = mistakes(error)
    renamed = {one.path: new for one in found if (new := RENAMED.get(".".join(map(str, one.path[-2:]))))}
    # A key under its old name is unknown, and missing under its new one: one mistake, not two.
    absent = {(*path[:-1], new) for path, new in renamed.items()}
    found = [one for one in found if not (one.kind == "missing" and one.path in absent)]
    first = found[0]
    if new := renamed.get(first.path):
        line = f"{'.'.join(map(str, first.path))}: expected {new}, its new name, found {first.path[-1]}; rename it"
    else:
        line = first.sentence + _REMEDIES.get(first.kind, "")
    return line + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
