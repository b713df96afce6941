"""Decode images, and resize them to JPEG."""

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from firstsight.core.params import Data
from firstsight.readers.problems import BadRecordError, reason
from firstsight.readers.suffixes import VIDEOS
from firstsight.records.resizing import fitted_size

# A side of a visual token in pixels, and the fewest pixels of an image: four of them.
_TOKEN_SIDE = 28
_LEAST_PIXELS = 4 * _TOKEN_SIDE**2
# How Pillow makes 8 bits of the 2, 4 or 16 with which a PNG's channels are stored.
_PNG_SCALES = {"L;2": lambda value: 85 * value, "L;4": lambda value: 17 * value, "RGB;16B": lambda value: value >> 8}


def encode(image: Image.Image, data: Data, size: tuple[int, int] | None = None) -> bytes:
    """Return a JPEG of the image, resized to at most `data.max_pixels` and sides divisible by 28 (one visual token).

    `size` is the width and height that it is shown with, where its pixels are not square.
    """
    width, height = size or image.size
    height, width = fitted_size(height, width, _TOKEN_SIDE, _LEAST_PIXELS, data.max_pixels)
    buffer = io.BytesIO()
    _on_white(image).resize((width, height)).save(buffer, "JPEG", quality=data.jpeg_quality)
    return buffer.getvalue()


def _on_white(image: Image.Image) -> Image.Image:
    """Return the image as RGB, on white where it is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    shown = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(shown, mask=shown.getchannel("A"))
    return white


def read_image(path: Path | BinaryIO, data: Data, name: str | None = None) -> bytes:
    """Return one image file as resized JPEG bytes. Errors call it `name`, by default the path.

    Raises:
        BadRecordError: the image cannot be read.
    """
    try:
        with Image.open(path) as image:
            _scale_transparent(image)
            image.load()
            return encode(_eight_bits(_as_held(image)), data)
    except UnidentifiedImageError:
        raise BadRecordError(
            f"expected a readable image, found {name or path} (of no known format; {VIDEOS}); repair or remove it"
        ) from None
    except Exception as error:  # over a damaged file, decoders raise anything
        raise BadRecordError(
            f"expected a readable image, found {name or path} ({reason(error)}); repair or remove it"
        ) from None


def _scale_transparent(image: Image.Image) -> None:
    """Scale the value that stands for transparency as Pillow scales the pixels of a PNG that has not been loaded."""
    scale = _PNG_SCALES.get(str(image.tile[0].args)) if image.format == "PNG" and image.tile else None
    if scale and "transparency" in image.info:
        value = image.info["transparency"]
        image.info["transparency"] = tuple(map(scale, value)) if isinstance(value, tuple) else scale(value)


def _as_held(image: Image.Image) -> Image.Image:
    """Return the image turned upright: a camera held so stores it on its side, with its orientation in an EXIF tag."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the tags are damaged, not the image
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale an image of more than 8 bits a channel to 8, because Pillow would clip values above 255.

    Raises ValueError when floating-point pixels are outside of 0 to 255.
    """
    if image.mode.startswith("I"):
        scaled = image.convert("I").point(lambda value: value / 256).convert("L")
        # In a grey image, one of its values may stand for transparency.
        transparent = scaled.info.pop("transparency", None)
        if transparent is not None:
            scaled.putalpha(Image.fromarray(np.asarray(image) != transparent))
        return scaled
    if image.mode == "F":
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if not 0 <= low <= high <= 255:
            raise ValueError(f"with pixels from {low:g} to {high:g}, where 0 to 1 or 0 to 255 is expected")
        return image.point(lambda value: value * 255) if high <= 1 else image
    return image
