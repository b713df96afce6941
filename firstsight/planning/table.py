"""The plan as a table, a row a stage, and what it means for a GPU."""

from dataclasses import dataclass

from firstsight.core.params import Optimisation, Params
from firstsight.models.shapes import on_meta
from firstsight.planning import arithmetic, memory
from firstsight.planning.memory import LOADED, Memory, Shape
from firstsight.planning.workload import Workload

HEADER = ("stage", "loads", "weights", "training", "activations", "GPU", "disk", "scratch", "time")


@dataclass(frozen=True)
class Row:
    """A stage: what it loads, bytes on the GPU (None where it needs none), bytes on disk, operations.

    `scratch` is on disk while the stage runs: its checkpoints.
    """

    stage: str
    loads: str
    memory: Memory | None = None
    disk: float = 0.0
    scratch: float = 0.0
    operations: float = 0.0


def rows(params: Params, work: Workload) -> list[Row]:
    """The stages that take weights, memory or time; what fine-tuning or caching leaves out is not among them."""
    teacher, student = (Shape(model.source, on_meta(model)) for model in (params.models.teacher, params.models.student))
    train, evaluate = params.train, params.evaluate

    def variant(name: str, shape: Shape, precision: str) -> Row:
        used = memory.answering(shape, precision, evaluate.batch_size, evaluate.max_new_tokens, work.largest)
        return Row(
            f"evaluate {name}",
            f"{_millions(shape.parameters)} {_named(precision)}",
            used,
            operations=arithmetic.answering(shape, work, evaluate.max_new_tokens),
        )

    found = [
        Row("download-models", f"{_millions(shape.parameters)} {role}", disk=shape.stored_bytes)
        for role, shape in (("teacher", teacher), ("student", student))
    ]
    if params.finetune_teacher.enabled:
        settings = params.finetune_teacher
        found.append(
            Row(
                "finetune-teacher",
                _training(teacher, settings),
                memory.finetuning(teacher, settings, work.largest),
                disk=teacher.stored_bytes if settings.method == "full" else 4 * teacher.trained(settings),
                scratch=_checkpoints(teacher, settings),
                operations=arithmetic.finetuning(teacher, settings, work),
            )
        )
    if params.targets.kind != "online":
        found.append(
            Row(
                "cache-teacher-targets",
                f"{_millions(teacher.parameters)} {_named(params.targets.precision)}",
                memory.caching(teacher, params, work.largest),
                disk=_targets(student, teacher, params, work),
                operations=arithmetic.caching(teacher, work),
            )
        )
    beside = f", teacher {_named(params.targets.precision)}" if params.targets.kind == "online" else ""
    return [
        *found,
        Row(
            "distill",
            _training(student, train) + beside,
            memory.distilling(student, teacher, params, work.largest),
            disk=student.stored_bytes,
            scratch=_checkpoints(student, train),
            operations=arithmetic.distilling(student, teacher, params, work),
        ),
        Row(
            "quantize-student",
            f"{_millions(student.parameters)} {params.quantize.method}",
            memory.quantising(student, params.quantize.method),
            disk=student.weights_bytes(params.quantize.method),
        ),
        variant("teacher", teacher, evaluate.precision),
        variant("student", student, evaluate.precision),
        variant("student-distilled", student, evaluate.precision),
        variant("student-quantized", student, params.quantize.method),
    ]


def render(found: list[Row]) -> str:
    """The rows, and below them the sum on disk."""
    operations = sum(row.operations for row in found)
    cells = [HEADER, *(_cells(row, operations) for row in found)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADER))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    kept, scratch = sum(row.disk for row in found), max(row.scratch for row in found)
    total = f"disk  {_disk(kept)} kept, and {_disk(scratch)} of checkpoints while a stage trains"
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", total])


def verdict(found: list[Row], name: str, memory_bytes: float) -> str:
    """Whether all stages fit a GPU, and by how much; which stages do not."""
    largest = max((row for row in found if row.memory), key=lambda row: row.memory.total)
    spare = memory_bytes - largest.memory.total
    if spare >= 0:
        return f"fits {name} with {_memory(spare)} to spare"
    stages = [row.stage for row in found if row.memory and row.memory.total > memory_bytes]
    return f"does not fit {name}: {', '.join(stages)} would take up to {_memory(largest.memory.total)}"


def _cells(row: Row, operations: float) -> tuple[str, ...]:
    used = row.memory
    parts = (used.weights, used.training, used.activations, used.total) if used else (0,) * 4
    return (
        row.stage,
        row.loads,
        *(_memory(one) if one else "-" for one in parts),
        *(_disk(one) if one else "-" for one in (row.disk, row.scratch)),
        f"{row.operations / operations:.1%}" if row.operations else "-",
    )


def _checkpoints(shape: Shape, settings: Optimisation) -> float:
    """Best, last and the one being written: trained weights in float32 and AdamW's moments."""
    return 3 * 12 * shape.trained(settings)


def _targets(student: Shape, teacher: Shape, params: Params, work: Workload) -> float:
    """What is cached of the teacher: a row an answer token, and for hidden states the head."""
    questions = work.questions["train"] + work.questions["validation"]
    tokens = questions * work.typical.answer_tokens
    if params.targets.kind == "hidden":
        return tokens * (4 + 2 * teacher.hidden) + memory.head_bytes(student, teacher)
    return tokens * (4 + 8 * params.targets.k + 4)


def _training(shape: Shape, settings: Optimisation) -> str:
    trained = shape.trained(settings)
    if settings.method == "full":
        return f"{_millions(trained)} trained of {_millions(shape.parameters)}"
    return f"{_millions(trained)} {settings.method}, {_millions(shape.parameters)} {LOADED[settings.method]}"


def _named(precision: str) -> str:
    return "bfloat16" if precision == "auto" else precision


def _millions(count: float) -> str:
    """8291375616 -> "8.29 G", of parameters."""
    for divisor, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= divisor:
            return f"{count / divisor:.3g}{prefix}"
    return f"{count:.0f}"


def _memory(count: float) -> str:
    """2 ** 30 -> "1.0 GiB"; as GPUs are sold."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 / 20 else f"{count / 2**20:.1f} MiB"


def _disk(count: float) -> str:
    """1e9 -> "1.0 GB"; as disks are."""
    return f"{count / 1e9:.1f} GB" if count >= 5e7 else f"{count / 1e6:.1f} MB"
