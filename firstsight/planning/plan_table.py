"""Make the plan: a table with one row per stage, and whether it fits a GPU."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from firstsight.core.params import Evaluate, Optimisation, Params, Quantize, Train
from firstsight.core.variants import CONTROL, DISTILLED, FORMATS
from firstsight.loss.teachers import HiddenTeacher, TopKTeacher
from firstsight.models.architecture import is_encoder
from firstsight.models.device import TRAINING_PRECISIONS
from firstsight.models.egogpt import EgoGptConfig
from firstsight.planning import arithmetic, gpu_memory, hours
from firstsight.planning.gpu_memory import Memory
from firstsight.planning.hours import Card, Effort
from firstsight.planning.model_shape import Shape, on_gpu
from firstsight.planning.shapes import EGOGPT_SPEECH, KNOWN, on_meta
from firstsight.planning.workload import Sizes, Workload, visual_tokens

# Assumed where a data set of the hub is to name its classes.
_CLASSES = 10

HEADER = ("stage", "loads", "weights", "training", "activations", "cached", "GPU", "disk", "scratch", "time")


@dataclass(frozen=True)
class Row:
    """Describe a stage: what it loads, bytes on the GPU (None: it uses none), bytes on disk, what it computes
    (None: nothing that takes long).

    `scratch` is the bytes that are on disk while the stage runs, and not afterwards: training checkpoints, and the
    graphs that others are made from.
    """

    stage: str
    loads: str
    memory: Memory | None = None
    disk: float = 0.0
    scratch: float = 0.0
    effort: Effort | None = None


def rows(params: Params, work: Workload) -> list[Row]:
    """Return the stages that take disk, memory or time, without those that `params` disable."""
    named = {"teacher": params.models.teacher, "student": params.models.student}
    shapes = {role: Shape(model.source, on_meta(model)) for role, model in named.items() if model}
    student, teacher = shapes["student"], shapes.get("teacher")
    found = [
        Row("download-models", f"{_count(shape.parameters)} {role}", disk=_downloaded(shape))
        for role, shape in shapes.items()
    ]
    what = "records" if work.typical.kind == "none" else "media"
    found.append(Row("build-egoqa-dataset", f"{_count(sum(work.samples.values()))} {what}", disk=work.disk))
    if teacher and params.finetune_teacher.enabled:
        found.append(_finetuning("finetune-teacher", teacher, params.finetune_teacher, work))
    if teacher and params.targets.kind != "online":
        found.append(_cache_teacher_targets(student, teacher, params, _scored(teacher, params, work)))
    if params.train.caches_visual_tokens:
        found.append(_cache_visual_tokens(student, params.train, work))
    if teacher:
        found.append(_distill(student, teacher, params, _scored(student, params, work)))
    finetuned = teacher is None or params.control.enabled
    if finetuned:
        found.append(_finetuning("finetune-student", student, params.train, _scored(student, params, work)))
    if not is_encoder(student.model.config.model_type):
        settings = params.quantize
        found += [_quantize_student(student, method, settings, work.largest) for method in settings.methods]
    found += _exports("export-student", student, params.export.formats)
    found += _exports("export-teacher", teacher, ["onnx"]) if teacher and params.export.teacher else []
    variants = {
        **({"teacher": (teacher, params.evaluate.precision)} if teacher else {}),
        **{f"teacher-{method}": (teacher, method) for method in params.evaluate.teacher_methods if teacher},
        "student": (student, params.evaluate.precision),
        **({CONTROL: (student, params.evaluate.precision)} if finetuned else {}),
        **({DISTILLED: (student, params.evaluate.precision)} if teacher else {}),
        **{f"student-{method}": (student, method) for method in params.quantize.methods},
    }
    return found + [
        _evaluate(name, shape, precision, params, _scored(shape, params, work))
        for name, (shape, precision) in variants.items()
    ]


def _scored(shape: Shape, params: Params, work: Workload) -> Workload:
    """Return the data as a model reads them that is compared over classes; unchanged where it is not.

    A language model reads the names of all classes behind each question, an encoder none.
    """
    if params.targets.over == "tokens":
        return work
    names = 0 if is_encoder(shape.model.config.model_type) else _classes(params)
    typical, largest = (replace(one, answer_tokens=names * one.answer_tokens) for one in (work.typical, work.largest))
    return replace(work, typical=typical, largest=largest)


def _classes(params: Params) -> int:
    return len(params.data.classes) if params.data.classes else _CLASSES


def _downloaded(shape: Shape) -> float:
    """Return the bytes of a model on disk; for EgoGPT from the hub also those of the original in the hub's cache."""
    if shape.name not in KNOWN or shape.model.config.model_type != EgoGptConfig.model_type:
        return shape.stored_bytes
    return shape.stored_bytes + shape.stored_bytes / shape.parameters * (shape.parameters + EGOGPT_SPEECH)


def _finetuning(stage: str, shape: Shape, settings: Optimisation, work: Workload) -> Row:
    return Row(
        stage,
        _training(shape, settings),
        gpu_memory.finetuning(shape, settings, work.largest),
        disk=shape.stored_bytes if settings.method == "full" else 4 * shape.trained(settings),
        scratch=_checkpoints(shape, settings),
        effort=Effort(arithmetic.finetuning(shape, settings, work), trains=True),
    )


def _cache_teacher_targets(student: Shape, teacher: Shape, params: Params, work: Workload) -> Row:
    return Row(
        "cache-teacher-targets",
        _loaded(teacher, params.targets.precision),
        gpu_memory.caching(student, teacher, params, work.largest),
        disk=_targets(student, teacher, params, work),
        effort=Effort(arithmetic.caching(teacher, work), tokens=_generated(params, work)),
    )


def _cache_visual_tokens(student: Shape, settings: Train, work: Workload) -> Row:
    return Row(
        "cache-visual-tokens",
        _loaded(student, TRAINING_PRECISIONS[settings.method]),
        gpu_memory.looking(student, settings, work.largest),
        disk=_visual_tokens(student, work),
        effort=Effort(arithmetic.looking(student, work)),
    )


def _distill(student: Shape, teacher: Shape, params: Params, work: Workload) -> Row:
    online = f", {_loaded(teacher, params.targets.precision)}" if params.targets.kind == "online" else ""
    return Row(
        "distill",
        _training(student, params.train) + online,
        gpu_memory.distilling(student, teacher, params, work.largest),
        disk=student.stored_bytes,
        scratch=_checkpoints(student, params.train),
        effort=Effort(arithmetic.distilling(student, teacher, params, work), trains=True),
    )


def _quantize_student(student: Shape, method: str, settings: Quantize, sizes: Sizes) -> Row:
    return Row(
        f"quantize-student {method}",
        _loaded(student, method),
        gpu_memory.quantizing(student, method, settings, sizes),
        disk=student.weights_bytes(method),
    )


def _exports(stage: str, shape: Shape, formats: Sequence[str]) -> list[Row]:
    """Return a row for each exported folder. All are made from float32 graphs, which are kept for "onnx" alone."""
    traced = 0 if "onnx" in formats else shape.exported_bytes("float32")
    return [
        Row(f"{stage} {name}", _loaded(shape, "float32"), disk=shape.exported_bytes(FORMATS[name]), scratch=traced)
        for name in formats
    ]


def _evaluate(variant: str, shape: Shape, precision: str, params: Params, work: Workload) -> Row:
    settings = params.evaluate
    # Classes are read in the same pass as the question, and nothing is generated.
    generates = params.targets.over == "tokens"
    tokens = _answer_tokens(settings, work) if generates else math.ceil(work.largest.answer_tokens)
    return Row(
        f"evaluate {variant}",
        _loaded(shape, precision),
        gpu_memory.answering(
            shape,
            precision,
            (1, *settings.throughput_batch_sizes, settings.batch_size),
            max(tokens, settings.latency_new_tokens),
            work.largest,
        ),
        effort=Effort(
            arithmetic.answering(shape, work, tokens),
            tokens=generates
            * (
                math.ceil(work.questions["test"] / settings.batch_size) * tokens
                + settings.latency_runs * settings.latency_new_tokens
            ),
            precision=precision,
        ),
    )


def _generated(params: Params, work: Workload) -> float:
    """Return how many times the teacher computes a next token for questions without an answer, in batches."""
    if params.data.unanswered != "teacher" or params.targets.over == "classes":
        return 0
    open_questions = work.questions["train"] * (1 - params.data.labelled_fraction)
    return math.ceil(open_questions / params.targets.batch_size) * work.typical.answer_tokens


def render(found: list[Row]) -> str:
    """Return the rows as a plain-text table, with the total on disk below it."""
    from firstsight.reporting import text_table  # imported here because benchmarks plan without its library

    operations = sum(row.effort.operations for row in found if row.effort)
    table = text_table.render([HEADER, *(_cells(row, operations) for row in found)], left=2)
    return f"{table}\n\ndisk  {render_disk(found)}"


def render_disk(found: list[Row]) -> str:
    """Describe what all stages together take of the disk."""
    kept, scratch = sum(row.disk for row in found), max(row.scratch for row in found)
    return f"{_disk(kept)} kept, and {_disk(scratch)} more while a stage runs"


def render_hours(found: list[Row], cards: Sequence[Card]) -> str:
    """Return a plain-text table of hours: a row for each GPU, a column for each stage, evaluations as one."""
    from firstsight.reporting import text_table  # as in `render`

    stages: dict[str, list[Effort]] = {}
    for row in found:
        if row.effort:
            stages.setdefault(row.stage.split()[0], []).append(row.effort)
    everything = [effort for efforts in stages.values() for effort in efforts]
    cells = [
        (card.name, *(hours.between(*hours.total(one, card)) for one in (*stages.values(), everything)))
        for card in cards
    ]
    return text_table.render([("hours on", *stages, "all"), *cells])


def all_hours(found: list[Row], card: Card) -> str:
    """Return the range of hours that all stages together take on a GPU."""
    return hours.between(*hours.total((row.effort for row in found if row.effort), card))


def verdict(found: list[Row], name: str, memory_bytes: float) -> str:
    """Return a line: all stages fit the GPU, and by how much, without cached memory; or which stages do not."""
    needed = {row.stage: row.memory.needed for row in found if row.memory}
    largest = max(needed.values())
    if largest <= memory_bytes:
        return f"fits {name} with {_memory(memory_bytes - largest)} to spare"
    stages = [stage for stage, size in needed.items() if size > memory_bytes]
    return f"does not fit {name}: {', '.join(stages)} would need up to {_memory(largest)}"


def _cells(row: Row, operations: float) -> tuple[str, ...]:
    """Return a row's cells in the order of `HEADER`; `operations` is the sum over all stages."""
    used = row.memory
    parts = (used.weights, used.training, used.activations, used.cached, used.total) if used else (0,) * 5
    return (
        row.stage,
        row.loads.replace(", ", ",\n"),
        *(_memory(one) if one else "-" for one in parts),
        *(_disk(one) if one else "-" for one in (row.disk, row.scratch)),
        f"{row.effort.operations / operations:.1%}" if row.effort else "-",
    )


def _checkpoints(shape: Shape, settings: Optimisation) -> float:
    """Return the bytes of four checkpoints (last two, best, being written): float32 weights and AdamW's moments."""
    return 4 * (4 * shape.trained(settings) + gpu_memory.moments(shape, settings))


def _targets(student: Shape, teacher: Shape, params: Params, work: Workload) -> float:
    """Return the bytes of the cached targets: a row per answer token, and for hidden states the teacher's head.

    Over classes, a question has a score of each, and its own class.
    """
    questions = work.questions["train"] + work.questions["validation"]
    if params.targets.over == "classes":
        return questions * 4 * (1 + _classes(params))
    tokens = questions * work.typical.answer_tokens
    if params.targets.kind == "hidden":
        row = HiddenTeacher.bytes_per_token(teacher.hidden, 2)
        return tokens * (4 + row) + gpu_memory.head_bytes(student, teacher)
    return tokens * (4 + TopKTeacher.bytes_per_token(min(params.targets.k, student.rows, teacher.rows)))


def _visual_tokens(student: Shape, work: Workload) -> float:
    """Return the bytes of the student's visual tokens, in 16 bits, of the train and validation splits."""
    samples = work.samples["train"] + work.samples["validation"]
    return samples * visual_tokens(student.model, work.typical) * student.hidden * 2


def render_visual_tokens(params: Params, work: Workload) -> str | None:
    """Return a line that says what caching visual tokens takes of distill, and saves.

    None where the vision tower is trained, and where nothing is distilled.
    """
    if params.train.train_vision or params.models.teacher is None:
        return None
    teacher, student = (Shape(model.source, on_meta(model)) for model in (params.models.teacher, params.models.student))
    computed, cached = (
        arithmetic.distilling(student, teacher, params.model_copy(update={"train": train}), work)
        for choice in ("computed", "cached")
        for train in [params.train.model_copy(update={"visual_tokens": choice})]
    )
    share = (arithmetic.looking(student, work) + cached) / computed
    size = _disk(_visual_tokens(student, work))
    if params.train.caches_visual_tokens:
        return f"visual tokens are cached, {size}: with their stage, distill takes {share:.0%} of what it would without"
    return f"visual tokens are computed in every epoch: cached, {size}, they would leave distill {share:.0%} of it"


def render_exports(params: Params, work: Workload) -> str | None:
    """Return lines that say what exporting takes of memory and time, and how long evaluating an export takes.

    Float32 weights are in memory twice while they are exported: as the model, and as the graphs being written. None
    where no model is exported whose size would matter.
    """
    asked = {"student": (params.models.student, params.export.formats)}
    if params.models.teacher and params.export.teacher:
        asked["teacher"] = params.models.teacher, ["onnx"]
    lines = []
    for role, (model, formats) in asked.items():
        shape = Shape(model.source, on_meta(model))
        if not formats or shape.parameters < hours.FEWEST_PARAMETERS:
            continue
        memory = 4 * shape.parameters + shape.exported_bytes("float32")
        exporting = arithmetic.exporting(shape, work, params.export, formats)
        evaluating = arithmetic.answering(shape, work, _answer_tokens(params.evaluate, work))
        evaluating += arithmetic.measuring(shape, work, params.evaluate)
        taken = [hours.between(*[count / hours.PROCESSOR / 3600] * 2) for count in (exporting, evaluating)]
        lines.append(
            f"export-{role} takes {_memory(memory)} of the machine's memory and, on two cores, {taken[0]} hours; "
            f"evaluating an export of it takes {taken[1]}"
        )
    return "\n".join(lines) or None


def _answer_tokens(settings: Evaluate, work: Workload) -> int:
    return settings.max_new_tokens or math.ceil(work.largest.answer_tokens)


def _training(shape: Shape, settings: Optimisation) -> str:
    """Describe what a training stage loads and trains."""
    trained = _count(shape.trained(settings))
    if settings.method == "full":
        return f"{trained} trained of {_count(shape.parameters)}"
    return f"{trained} {settings.method}, {_loaded(shape, TRAINING_PRECISIONS[settings.method])}"


def _loaded(shape: Shape, precision: str) -> str:
    """Describe a model's size and precision."""
    return f"{_count(shape.parameters)} {on_gpu(precision)}"


def _count(parameters: float) -> str:
    """Return a count with a decimal prefix: 8291375616 gives "8.29 G"."""
    for divisor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if parameters >= divisor:
            return f"{parameters / divisor:.3g} {prefix}"
    return f"{parameters:.0f}"


def _memory(count: float) -> str:
    """Return bytes in binary units, as GPUs are sold: 2 ** 30 gives "1.0 GiB"."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 / 20 else f"{count / 2**20:.1f} MiB"


def _disk(count: float) -> str:
    """Return bytes in decimal units, as disks are sold: 1e9 gives "1.0 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 5e7 else f"{count / 1e6:.1f} MB"
