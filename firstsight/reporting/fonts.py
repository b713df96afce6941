"""Choose fonts for text in any script: no font that matplotlib bundles covers them all."""

import logging
from functools import cache

from matplotlib import font_manager
from matplotlib.font_manager import FontProperties
from PIL import ImageFont

# The first is bundled with matplotlib (Latin, Greek, Cyrillic, Arabic and more); the others are used if installed.
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
# Suppresses warnings about fonts that have a single weight.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


@cache
def families() -> tuple[str, ...]:
    """Return the installed fonts, in the order in which they are searched for a character."""
    installed = set(font_manager.get_font_names())
    return tuple(name for name in _WANTED if name in installed)


def drawable(text: str) -> str:
    """Return the text with characters that no font has replaced by escapes such as \\u4f60."""
    return "".join(one if _has(families(), one) else one.encode("ascii", "backslashreplace").decode() for one in text)


def pillow_font(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return the font that covers most of a text that `drawable` returned: Pillow draws a text in a single font."""
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
