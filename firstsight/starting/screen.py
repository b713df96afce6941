"""Show a person what was found and what is about to be done, by rich: tables on a terminal, plain text in a file."""

import shlex
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from firstsight.starting.records import Found


# The most characters of a prompt or answer that are shown.
_LONGEST = 240

console = Console(highlight=False)


def title(text: str) -> None:
    console.print(Text(f"\n{text}", style="bold"))


def note(text: str, style: str = "") -> None:
    console.print(Padding(Text(text, style=style), (0, 0, 0, 2)))


def answered(question: str, answer: str) -> None:
    """Show a question and its answer, in the place of the list that it was chosen from."""
    console.print(Text.assemble(("? ", "#5f819d"), (f"{question} ", "bold"), (answer, "bold #ff9d00")))


def error(text: str) -> None:
    console.print(Text(f"error: {text}", style="red"), soft_wrap=True)


def commands(heading: str, lines: list[tuple[list[str], str]]) -> None:
    """Show commands and what each does, each on a line of its own, unbroken, so that it can be copied."""
    title(heading)
    width = max(len(shlex.join(words)) for words, _ in lines)
    for words, what in lines:
        line = Text(f"  {shlex.join(words):{width}}", style="bold")
        console.print(line.append(f"  # {what}", style="dim not bold"), soft_wrap=True)


def records(name: str, found: "Found") -> None:
    """Show how many records each split has, and a few records as they will be read."""
    title(f"{name}: {counted(found.counts)}")
    if found.left_out:
        note("left out: " + ", ".join(f"{count:,} {reason}" for reason, count in sorted(found.left_out.items())))
    if found.classes:
        note(f"{len(found.classes)} classes: {', '.join(found.classes)}")
    if found.unanswered:
        note(f"{found.unanswered:,} without an answer, which the teacher is to give")
    table = Table(box=box.SIMPLE, show_lines=True, show_edge=False, pad_edge=False, header_style="dim")
    asked = any(one.prompt for one in found.shown)
    answer = "class" if found.classes else "answer" if asked else "text"
    for column in ("split", *(["about"] if found.has_media else []), *(["prompt"] if asked else []), answer):
        table.add_column(column, overflow="fold")
    for one in found.shown:
        about = [one.media] if found.has_media else []
        prompt = [Text(_cut(one.prompt))] if asked else []
        table.add_row(one.split, *about, *prompt, Text(_cut(one.answer) or "(none)"))
    console.print(Padding(table, (0, 0, 1, 2)))


def rows(heading: str, lines: dict[str, str]) -> None:
    """Show named values below a heading."""
    title(heading)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in lines.items():
        table.add_row(name, Text(value))
    console.print(Padding(table, (0, 0, 0, 2)))


def counted(counts: dict[str, int]) -> str:
    """Return the records of each split in words, such as "200 train, 59 validation, 48 test"."""
    return ", ".join(f"{count:,} {split}" for split, count in counts.items())


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
