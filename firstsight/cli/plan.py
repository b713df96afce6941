"""firstsight plan: what a run needs, before anything is downloaded."""

from contextlib import chdir
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from firstsight.planning.hours import Card

# GPUs that are common, in GiB, for a machine that has none.
COMMON_GIB = (24, 48, 80)


def plan(
    path: Annotated[Path, typer.Argument(metavar="PARAMS", help="A parameter file, such as a preset.")] = Path(
        "params.yaml"
    ),
) -> None:
    """Estimate memory, disk and time of a run.

    The table has memory, disk and share of time of every stage; below it are which GPU the run fits, and the hours.

    Nothing is downloaded and nothing is computed but sizes, on any machine. GPU memory is in GiB, as GPUs are sold;
    disk in GB. Paths in the file are relative to the repository that it lies in, else to the current folder.
    """
    from firstsight.core import params
    from firstsight.planning import hours, plan_table
    from firstsight.planning.shapes import on_meta
    from firstsight.planning.workload import reads_text_alone, workload

    loaded = params.load(path)
    root = _repository(path)
    with chdir(root):
        named = [model for model in (loaded.models.teacher, loaded.models.student) if model]
        built = [on_meta(model) for model in named]
        place = path.absolute().relative_to(root) if path.absolute().is_relative_to(root) else path
        work = workload(loaded.data, place, text_alone=all(reads_text_alone(one.config) for one in built))
        rows = plan_table.rows(loaded, work)
        looking, exporting = (
            render(loaded, work) for render in (plan_table.render_visual_tokens, plan_table.render_exports)
        )
    print(f"params  {path}\ndata    {work.source}\n\n{plan_table.render(rows)}\n")
    for line in filter(None, (looking, exporting)):
        print(f"{line}\n")
    for name, memory in gpus():
        print(plan_table.verdict(rows, name, memory))
    if built[-1].num_parameters() >= hours.FEWEST_PARAMETERS:
        print(f"\n{plan_table.render_hours(rows, cards())}")
        print(f"measured on one {hours.MEASURED}, carried over to others; how: firstsight/planning/hours.py")
    for model, one in zip(named, built, strict=True):
        if reads_text_alone(one.config) and work.typical.kind != "none":
            print(f"\n{model.source} reads text alone: for it media are not counted, and its stages refuse them")
    if built[0].num_parameters() < built[-1].num_parameters():
        print("\nthe teacher has fewer parameters than the student: are models.teacher and models.student swapped?")
    tokens = min(model.config.get_text_config().vocab_size for model in built)
    if loaded.targets.kind == "topk" and loaded.targets.k > tokens:
        print(f"\ntargets.k is {loaded.targets.k:,}, more than there are tokens: all of at most {tokens:,} are kept")
    print(
        "\ncached gives way, and fits is without it: what freed tensors leave, CUDA graphs, paged moments (adamw_8bit)"
    )
    print("time is a stage's share of the arithmetic")
    print("how GPU memory is estimated, and what is left out: firstsight/planning/gpu_memory.py")


def _repository(path: Path) -> Path:
    """Return the nearest folder above the file that has a dvc.yaml, else the current folder."""
    above = path.absolute().parents
    return next((folder for folder in above if (folder / "dvc.yaml").is_file()), Path.cwd())


def gpus() -> list[tuple[str, int]]:
    """Return name and bytes of the GPUs of this machine, or of common ones."""
    import torch

    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    if found:
        return [(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)", gpu.total_memory) for gpu in found]
    return [(f"{size} GiB", size << 30) for size in COMMON_GIB]


def cards() -> "list[Card]":
    """Return the GPUs of this machine whose peak is known, or common ones."""
    from firstsight.planning.hours import CARDS, known

    names = {name.rsplit(" (", 1)[0] for name, _ in gpus()}
    return [card for card in map(known, names) if card] or list(CARDS)
