"""Read texts from a plain text file (UTF-8), such as WikiText's: each line that is not empty is a paragraph, a record.

A line between single equals signs, " = Robert Boulter = ", is the title of an article in WikiText: the paragraphs up to
the next title are one group, so that no article is in two splits. Headings of any depth (" = = Career = = ") are no
records. Without titles, each paragraph is a group of its own. Words are left as they are in the file: in WikiText,
" @-@ " is a hyphen within a word, " @,@ " and " @.@ " are those of numbers, and "<unk>" is a rare word.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from firstsight.core.params import Data
from firstsight.readers.problems import Problems
from firstsight.readers.source_record import Asked, source_record
from firstsight.readers.text_files import read_lines

# Words between as many equals signs on both sides.
_HEADING = re.compile(r"(=(?: =)*) ([^=].*?) \1")


class Paragraphs:
    """Tell paragraphs from headings and empty lines, which it counts in `problems.left_out`, one line after another.

    `title` is that of the article that the last line belongs to; None before the first.
    """

    def __init__(self, problems: Problems):
        self._left_out = problems.left_out
        self.title: str | None = None

    def is_one(self, line: str) -> bool:
        """Return whether the next line is a paragraph."""
        if heading := _HEADING.fullmatch(line.strip()):
            self.title = heading[2] if heading[1] == "=" else self.title
            self._left_out["heading"] += 1
        elif not line.strip():
            self._left_out["empty line"] += 1
        else:
            return True
        return False


def read(data: Data, problems: Problems) -> Iterator[Asked]:
    """Yield the paragraphs in the order of the file.

    Raises:
        UserError: the file is missing, not UTF-8 or empty.
    """
    path, paragraphs = Path(data.path), Paragraphs(problems)
    for number, line in read_lines(path, "a text file"):
        place = f"{path}: line {number}"
        if paragraphs.is_one(line):
            with problems.at(place):
                yield Asked(source_record(place, id=f"{path.stem}-{number}", text=line, group=paragraphs.title), None)
