"""Fonts of the pictures: data may be in any script, and matplotlib brings no font that has all of them."""

import logging
from functools import cache

from matplotlib import font_manager
from matplotlib.font_manager import FontProperties
from PIL import ImageFont

# The first comes with matplotlib: Latin, Greek, Cyrillic, Arabic and more. Of the others, those that a machine has.
_WANTED = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans CJK KR",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "Hiragino Sans GB",
    "Malgun Gothic",
    "Noto Sans Devanagari",
    "Nirmala UI",
    "Noto Emoji",
    "Symbola",
    "Segoe UI Symbol",
)
# A font that comes in one weight alone would be complained of.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


@cache
def families() -> tuple[str, ...]:
    """The fonts that are there, in the order in which they are asked for a character."""
    there = set(font_manager.get_font_names())
    return tuple(name for name in _WANTED if name in there)


def drawable(text: str) -> str:
    """The text; characters that none of the fonts has as escapes that can be read, such as \\u4f60."""
    return "".join(one if _has(families(), one) else one.encode("ascii", "backslashreplace").decode() for one in text)


def pillow_font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that has most of the text, as `drawable` returned it: Pillow draws a text in one font."""
    if text.isascii():
        return ImageFont.load_default(size)
    best = max(families(), key=lambda family: sum(_has((family,), one) for one in text))
    found = font_manager.findfont(FontProperties(family=best))
    return ImageFont.truetype(found, size, index=getattr(found, "face_index", 0))


def _has(among: tuple[str, ...], character: str) -> bool:
    return character.isascii() or any(ord(character) in _characters(family) for family in among)


@cache
def _characters(family: str) -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont(FontProperties(family=family))).get_charmap())
