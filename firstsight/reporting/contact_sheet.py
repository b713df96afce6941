"""Draw a contact sheet: samples with their images or frames, questions and answers, for a person to look at."""

import io
from collections.abc import Iterable
from itertools import count

from PIL import Image, ImageDraw, ImageFont

from firstsight.records.sample import LETTERS, Record, Sample
from firstsight.reporting.fonts import drawable, pillow_font

# Sizes on the sheet, in pixels.
_WIDTH, _GAP, _FRAME = 620, 20, 264
_TITLE, _TEXT, _LEADING = 20, 17, 23
_INK, _FAINT, _ANSWER, _RULE = (24, 24, 24), (110, 110, 110), (0, 92, 46), (205, 205, 205)
# Longer records are cut and end with dots, so that the sheet stays small.
_LINES_A_RECORD = 6


def contact_sheet(samples: Iterable[Sample], columns: int = 4) -> Image.Image:
    """Return an image with one cell per sample: id, frames (a video's in order), questions and answers."""
    cells = [_cell(sample) for sample in samples]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    size = _GAP + columns * (_WIDTH + _GAP), _GAP + sum(height + _GAP for height in heights)
    sheet = Image.new("RGB", size, "white")
    draw, top = ImageDraw.Draw(sheet), _GAP
    for row, height in zip(rows, heights, strict=True):
        for number, cell in enumerate(row):
            sheet.paste(cell, (_GAP + number * (_WIDTH + _GAP), top))
        draw.line((_GAP, top + height + _GAP // 2, size[0] - _GAP, top + height + _GAP // 2), fill=_RULE)
        top += height + _GAP
    return sheet


def _cell(sample: Sample) -> Image.Image:
    frames = strip(sample)
    lines = [line for record in sample.records for line in _lines(record)]
    top = _LEADING + 8
    cell = Image.new("RGB", (_WIDTH, top + frames.height + 8 + _LEADING * len(lines)), "white")
    draw = ImageDraw.Draw(cell)
    title = drawable(f"{sample.id}   {_kind(sample)}")
    draw.text((0, 0), title, fill=_FAINT, font=pillow_font(title, _TITLE))
    cell.paste(frames, (0, top))
    top += frames.height + 8
    for number, (text, colour) in enumerate(lines):
        draw.text((0, top + number * _LEADING), text, fill=colour, font=pillow_font(text, _TEXT))
    return cell


def _kind(sample: Sample) -> str:
    """Return a sample's kind, number of frames and frame rate in words."""
    rate = f", {sample.fps:.3g} a second" if sample.fps else ""
    several = f"{sample.media_kind} of {len(sample.frames)} frames{rate}"
    return {0: "no media", 1: sample.media_kind}.get(len(sample.frames), several)


def strip(sample: Sample, *, enlarge: bool = True) -> Image.Image:
    """Return the frames side by side, at most four per line; small frames keep their size unless `enlarge`."""
    frames = [Image.open(io.BytesIO(frame)).convert("RGB") for frame in sample.frames]
    if not frames:
        return Image.new("RGB", (1, 1), "white")
    across = min(len(frames), 3 if len(frames) in (5, 6) else 4)
    width = min(_FRAME, _WIDTH // across - 6)
    if not enlarge:
        width = min(width, frames[0].width)
    scale = width / frames[0].width
    size = width, round(frames[0].height * scale)
    down = -(-len(frames) // across)
    whole = Image.new("RGB", (across * (size[0] + 6) - 6, down * (size[1] + 6) - 6), "white")
    for number, frame in enumerate(frames):
        place = number % across * (size[0] + 6), number // across * (size[1] + 6)
        whole.paste(frame.resize(size, Image.Resampling.BICUBIC), place)
        if len(frames) > 1:
            ImageDraw.Draw(whole).text(
                (place[0] + 5, place[1] + 2),
                str(number + 1),
                fill="white",
                font=ImageFont.load_default(_TEXT),
                stroke_width=2,
                stroke_fill=_INK,
            )
    return whole


def _lines(record: Record) -> list[tuple[str, tuple[int, int, int]]]:
    """Return question, options and answer as lines that fit the cell, each with its colour."""
    answer = record.answer or "(none)"
    asked = [(line, _INK) for line in _wrapped(record.question.strip())]
    if record.options:
        options = dict(zip(LETTERS, record.options, strict=False))
        listed = " / ".join(f"{letter}. {option}" for letter, option in options.items())
        asked += [(line, _FAINT) for line in _wrapped(f"    {listed}")]
        if record.answer:
            answer = f"{answer}. {options[answer]}"
    return [*asked, *((line, _ANSWER) for line in _wrapped(f"    {answer}"))]


def _wrapped(text: str) -> list[str]:
    """Wrap text into lines that fit the cell, all indented as the first; words longer than a line are broken."""
    text = drawable(text)
    font = pillow_font(text, _TEXT)
    indent = text[: len(text) - len(text.lstrip())]
    lines, line = [], indent
    for word in text.split():
        longer = f"{line}{'' if line == indent else ' '}{word}"
        if font.getlength(longer) > _WIDTH and line != indent:
            lines.append(line)
            longer = indent + word
        # Scripts such as Chinese do not separate words by spaces.
        while font.getlength(longer) > _WIDTH and len(lines) <= _LINES_A_RECORD:
            fits = next(end for end in count(len(indent) + 1) if font.getlength(longer[: end + 1]) > _WIDTH)
            lines.append(longer[:fits])
            longer = indent + longer[fits:]
        line = longer
    lines.append(line)
    return lines if len(lines) <= _LINES_A_RECORD else [*lines[:_LINES_A_RECORD], f"{indent}..."]
