"""firstsight start: choose models, data and method at a terminal or by flags, and run the pipeline."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from firstsight.core.errors import UserError
from firstsight.core.params import FileSource
from firstsight.starting.choices import (
    ALPHA,
    DEMOS,
    MAX_TOKENS,
    METHODS,
    PROMPT,
    TEMPERATURE,
    TRIAL,
    Approach,
    Given,
    Method,
    typed,
)

if TYPE_CHECKING:
    from firstsight.core.params import Params
    from firstsight.starting.choose import Chosen


def start(
    approach: Annotated[Approach | None, typer.Option(help="Fine-tune alone, or distil a teacher.")] = None,
    method: Annotated[
        Method | None,
        typer.Option(metavar="METHOD", help=f"What is trained: {', '.join(METHODS)} (all weights). Default: lora."),
    ] = None,
    teacher: Annotated[str | None, typer.Option(metavar="MODEL", help="A hub id or folder, to distil from.")] = None,
    student: Annotated[str | None, typer.Option(metavar="MODEL", help="The model that is trained.")] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help=f"An annotation file, a data set of the hub, or a demo: {', '.join(DEMOS)}."),
    ] = None,
    source: Annotated[
        FileSource | None,
        typer.Option(
            metavar="FORM", help=f"Form of a file whose name does not say it: {', '.join(get_args(FileSource))}."
        ),
    ] = None,
    config: Annotated[str | None, typer.Option(metavar="NAME", help="The config of the hub's data set.")] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(metavar="OURS=THEIRS", help="The column of the hub's data set that holds a field of ours."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEMPLATE", help=PROMPT)] = None,
    max_tokens: Annotated[int | None, typer.Option(metavar="NUMBER", help=MAX_TOKENS)] = None,
    temperature: Annotated[float | None, typer.Option(metavar="T", help=TEMPERATURE)] = None,
    alpha: Annotated[float | None, typer.Option(metavar="WEIGHT", help=ALPHA)] = None,
    samples: Annotated[
        str | None,
        typer.Option(metavar="NUMBER", help=f"Training records of a trial, or all. Default: {TRIAL}, or all if fewer."),
    ] = None,
    run: Annotated[
        bool | None, typer.Option("--run/--no-run", help="Whether to run dvc repro in the end, without asking.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing: write params.yaml, and run it.")] = False,
) -> None:
    """Choose models, data and method, and run the pipeline.

    It asks for what no flag answers, shows records as they will be read and what firstsight plan says, writes
    params.yaml from a preset, and offers to run dvc repro. The old params.yaml is kept beside it.

    Without a terminal, or with --yes, nothing is asked. Approach, student, data and, to distil, teacher are then needed
    as flags.
    """
    asks = not yes and sys.stdin.isatty() and sys.stdout.isatty()
    fields = tuple(field or ())
    given = Given(
        *(approach, method, teacher, student, data, source, config, fields),
        *(prompt, max_tokens, temperature, alpha, samples),
    )
    given.check()
    if not asks and (missing := given.missing() + ([] if yes else ["--yes"])):
        why = "--yes asks nothing" if yes else "there is no terminal to ask at"
        raise UserError(
            f"firstsight start: expected {', '.join(missing)}, because {why}, found none; add what is missing"
        )

    from firstsight.core import params
    from firstsight.starting import questions, screen, settings
    from firstsight.starting.choose import choose

    chosen = choose(given, questions if asks else None)
    with settings.beside(settings.with_choices(chosen.preset, chosen.choices, chosen.found)) as path:
        loaded = params.load(path)
        screen.rows("What will run", summary(chosen, loaded))
        screen.rows("What firstsight plan says", verdict(chosen, loaded, path))
        print()
        if asks and not questions.confirm("Write this to params.yaml?", default=True):
            screen.note("params.yaml is unchanged")
            return
        kept = settings.put_in_place(path)
    screen.note(f"wrote params.yaml{f'; the old one is in {kept}' if kept else ''}")
    if asks and run is None:
        run = questions.confirm("Run dvc repro now?", default=False)
    finish(chosen, run or (yes and run is None))


def summary(chosen: "Chosen", loaded: "Params") -> dict[str, str]:
    """Return what was chosen, and what of the preset a person should know, by name."""
    from firstsight.starting import screen

    choices, train, found = chosen.choices, loaded.train, chosen.found
    learns = ", fine-tuned on the data first" if loaded.finetune_teacher.enabled else ""
    used = taken(chosen, loaded)
    rows = {
        "teacher": choices.teacher and f"{choices.teacher}{learns}",
        "student": choices.student,
        "method": f"{choices.method}, {train.epochs:g} epochs, learning rate {train.learning_rate:g}",
        "loss": choices.teacher and f"T = {train.temperature:g}, alpha = {train.alpha:g}",
        "data": f"{choices.given_data}: {screen.counted(used)}",
        "the rest": f"as in {chosen.preset}",
    }
    if choices.kind == "class":
        rows["classes"] = f"{len(found.classes)}, asked for by {typed(loaded.data.prompt or '')}"
    if choices.kind == "text":
        continued = min(loaded.evaluate.continuations, used["test"])
        rows["texts"] = (
            f"cut to {loaded.data.max_tokens} tokens; {continued} of the test split are continued, for ROUGE"
        )
    return {name: text for name, text in rows.items() if text}


def taken(chosen: "Chosen", loaded: "Params") -> dict[str, int]:
    """Return the number of records of each split that are used."""
    return {split: getattr(loaded.data, f"{split}_samples") or count for split, count in chosen.found.counts.items()}


def verdict(chosen: "Chosen", loaded: "Params", path: Path) -> dict[str, str]:
    """Return what firstsight plan says of the run: GPU memory, hours and disk, or why it says nothing."""
    import torch

    from firstsight.cli.plan import cards, gpus
    from firstsight.cli.quiet import quiet_transformers
    from firstsight.planning import hours, plan_table
    from firstsight.planning.shapes import on_meta
    from firstsight.planning.workload import text_workload, workload

    quiet_transformers()
    try:
        if texts := chosen.found.texts:
            work = text_workload("as read above", texts, taken(chosen, loaded))
        else:
            work = workload(loaded.data, path)
        found = plan_table.rows(loaded, work)
    except UserError as error:
        return {"no plan": str(error)}
    student = on_meta(loaded.models.student)
    rows = {"data": work.source, "GPU": "\n".join(plan_table.verdict(found, *gpu) for gpu in gpus())}
    if student.num_parameters() >= hours.FEWEST_PARAMETERS:
        rows["hours"] = "\n".join(f"{plan_table.all_hours(found, card)} on {card.name}" for card in cards())
    rows["disk"] = plan_table.render_disk(found)
    if loaded.runtime.device == "cuda" and not torch.cuda.is_available():
        rows["note"] = (
            "this machine has no GPU, and with runtime.device: cuda a stage that needs one stops with an error"
        )
    return rows


def finish(chosen: "Chosen", run: bool) -> None:
    """Run the pipeline, if it is to be run, and show the comparison; say the commands of what comes next."""
    from firstsight.core.variants import CONTROL, DISTILLED
    from firstsight.reporting.comparison import show
    from firstsight.running import to_the_end
    from firstsight.starting import screen

    publish = ["firstsight", "publish", DISTILLED if chosen.choices.teacher else CONTROL, "OWNER/NAME"]
    if not run:
        screen.commands(
            "What comes next",
            [
                (["dvc", "repro"], "run the pipeline"),
                (["firstsight", "table"], "then: before and after"),
                (publish, "what would be pushed to the hub"),
            ],
        )
        return
    screen.title("dvc repro")
    to_the_end.repro()
    screen.title("Before and after")
    show()
    screen.commands("What comes next", [(publish, "what would be pushed to the hub; with --push, push it")])
