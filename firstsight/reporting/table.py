"""The comparison table for a terminal, from the git-tracked metrics.

python -m firstsight.reporting.table
"""

from pathlib import Path

from firstsight.core.files import read_json
from firstsight.reporting.summary import VARIANTS

METRICS = Path("metrics")
HEADER = ("variant", "exact match", "F1", "retention", "parameters", "size", "latency")


def size(count: float, unit: str = "B") -> str:
    """1234567 -> "1.2 MB"; decimal prefixes."""
    for prefix in ("", "k", "M", "G"):
        if abs(count) < 1000 or prefix == "G":
            return f"{count:.3g} {prefix}{unit}".rstrip()
        count /= 1000
    raise AssertionError


def rows(quality: dict, performance: dict) -> list[tuple[str, ...]]:
    """Cells of the table, a row a variant, in the order of `HEADER`."""
    table = []
    for variant in VARIANTS:
        good, fast = quality[variant], performance[variant]
        table.append(
            (
                variant,
                f"{good['exact_match']:.3f} ({good['exact_match_low']:.2f}-{good['exact_match_high']:.2f})",
                f"{good['f1']:.3f}",
                f"{good['retention']:.1%}" if "retention" in good else "-",
                size(fast["parameters"], ""),
                size(fast["disk_bytes"]),
                f"{fast['latency_ms_p50']:.1f} ms",
            )
        )
    for name in ("question-only", "majority-answer"):
        table.append((name.replace("-", " "), f"{quality[name]['exact_match']:.3f}", *[""] * 5))
    return table


def render(quality: dict, performance: dict) -> str:
    cells = [HEADER, *rows(quality, performance)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADER))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


if __name__ == "__main__":
    print(render(read_json(METRICS / "quality.json", "report"), read_json(METRICS / "performance.json", "report")))
    print(
        "\nexact match with its 95% interval; without looking at the picture, question only is the best guess,\n"
        "majority answer the commonest answer to whatever is asked\n"
    )
    print(
        "report  metrics/report.html\nplots   metrics/plots/*.png, or: dvc plots show\n"
        "models  models/student-distilled, models/student-quantized"
    )
