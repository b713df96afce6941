"""Plan a run before anything is downloaded: memory, disk and relative time of every stage, and what GPU it fits.

    python -m firstsight.plan [presets/X.yaml]      params.yaml where no file is named

Nothing is computed but sizes, on any machine. GPU memory is in GiB, as GPUs are sold; disk in GB.
"""

import sys
from pathlib import Path

import torch

from firstsight.core import params
from firstsight.core.stage import main
from firstsight.planning import plan_table
from firstsight.planning.shapes import on_meta
from firstsight.planning.workload import reads_text_alone, workload

# What GPUs there commonly are, where there is none to ask.
COMMON_GIB = (24, 48, 80)


def gpus() -> list[tuple[str, int]]:
    """Name and bytes of the GPUs at hand, or of common ones."""
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    if found:
        return [(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)", gpu.total_memory) for gpu in found]
    return [(f"{size} GiB", size << 30) for size in COMMON_GIB]


def run() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else params.PARAMS_FILE
    loaded = params.load(path)
    work = workload(loaded.data, path)
    rows = plan_table.rows(loaded, work)
    print(f"params  {path}\ndata    {work.source}\n\n{plan_table.render(rows)}\n")
    for name, memory in gpus():
        print(plan_table.verdict(rows, name, memory))
    teacher, student = (on_meta(model) for model in (loaded.models.teacher, loaded.models.student))
    for source, built in ((loaded.models.teacher.source, teacher), (loaded.models.student.source, student)):
        if reads_text_alone(built.config):
            print(f"\n{source} reads text alone: for it media are not counted, and its stages refuse them")
    if teacher.num_parameters() < student.num_parameters():
        print("\nthe teacher has fewer parameters than the student: are models.teacher and models.student swapped?")
    rows = min(model.config.get_text_config().vocab_size for model in (teacher, student))
    if loaded.targets.kind == "topk" and loaded.targets.k > rows:
        print(f"\ntargets.k is {loaded.targets.k:,}, more than there are tokens: all of at most {rows:,} are kept")
    print("\ntime is a stage's share of the arithmetic, not hours")
    print("how GPU memory is estimated, and what is left out: firstsight/planning/gpu_memory.py")


if __name__ == "__main__":
    main(run)
