"""Turn images and clips into patches exactly as Qwen2-VL's processor does, in numpy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from firstsight.core.errors import UserError
from firstsight.engine.layout import Pictures
from firstsight.records.resizing import fitted_size

# What 16-bit weights of torchvision's resizing must stay below, and the most bits that they are shifted by.
_WEIGHT_LIMIT, _MOST_BITS = 1 << 15, 22
# The parameter a of Keys' cubic convolution.
_CUBIC = -0.5


@dataclass(frozen=True)
class Patches:
    """Hold the patches [t, h * w, channels * temporal_patch_size * patch_size^2] of an image or clip, float32.

    `grid` is (t, h, w) in patches; the patches of a merged token follow each other.
    """

    pixels: np.ndarray
    grid: tuple[int, int, int]

    def tokens(self, settings: Pictures) -> int:
        """Return the number of visual tokens."""
        return math.prod(self.grid) // settings.merge_size**2


def patches(frames: Sequence[Image.Image], is_video: bool, settings: Pictures) -> Patches:
    """Return the patches of one image, or of the frames of one clip, which are of the same size.

    An image is repeated to fill a temporal patch, and so is the last frame of a clip.

    Raises:
        UserError: a side is more than 200 times as long as the other.
    """
    size = _fitted_size(frames[0], is_video, settings)
    resized = np.stack([resize(np.asarray(frame), *size) for frame in frames]).astype(np.float32)
    mean, std = (
        np.array(value, np.float32) * np.float32(1 / settings.rescale_factor) for value in (settings.mean, settings.std)
    )
    normal = ((resized - mean) / std).transpose(0, 3, 1, 2)
    steps = settings.temporal_patch_size
    normal = np.concatenate([normal, np.repeat(normal[-1:], -len(normal) % steps, axis=0)])
    height, width = (side // settings.patch_size for side in size)
    merge, patch = settings.merge_size, settings.patch_size
    split = normal.reshape(-1, steps, 3, height // merge, merge, patch, width // merge, merge, patch)
    ordered = split.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    pixels = np.ascontiguousarray(ordered.reshape(len(ordered), height * width, -1))
    return Patches(pixels, (len(ordered), height, width))


def _fitted_size(frame: Image.Image, is_video: bool, settings: Pictures) -> tuple[int, int]:
    """Return the height and width to which the processor resizes an image or the frames of a clip."""
    least, most = settings.video_pixels if is_video else settings.image_pixels
    try:
        return fitted_size(frame.height, frame.width, settings.patch_size * settings.merge_size, least, most)
    except ValueError as error:
        raise UserError(f"picture: expected sides that a model can see, found {error}; crop it") from None


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize an image [H, W, 3] of bytes bicubically with antialiasing, bit for bit as torchvision does on the CPU.

    Pillow rounds differently: one pixel in two hundred would differ by a level.
    """
    across = _along_first_axis(pixels.transpose(1, 0, 2), width).transpose(1, 0, 2)
    return _along_first_axis(across, height)


def _along_first_axis(pixels: np.ndarray, length: int) -> np.ndarray:
    if len(pixels) == length:
        return pixels
    weights, bits = _weights(len(pixels), length)
    # Sums of whole numbers, which float64 holds exactly and multiplies faster than integers.
    sums = np.tensordot(weights, pixels.astype(np.float64), 1)
    return np.clip(np.floor((sums + (1 << bits >> 1)) / (1 << bits)), 0, 255).astype(np.uint8)


def _weights(before: int, after: int) -> tuple[np.ndarray, int]:
    """Return the whole weights [after, before] of each pixel in each resized one, and the bits they are shifted by."""
    scale = before / after
    stretch = max(scale, 1.0)
    centres, support = (np.arange(after) + 0.5) * scale, 2 * stretch
    first = np.maximum((centres - support + 0.5).astype(int), 0)[:, None]
    end = np.minimum((centres + support + 0.5).astype(int), before)[:, None]
    places = np.arange(before)
    weights = _keys((places - centres[:, None] + 0.5) / stretch) * ((places >= first) & (places < end))
    weights /= weights.sum(axis=1, keepdims=True)
    bits = 0
    while bits < _MOST_BITS and int(0.5 + weights.max() * (1 << (bits + 1))) < _WEIGHT_LIMIT:
        bits += 1
    return np.trunc(weights * (1 << bits) + np.copysign(0.5, weights)), bits


def _keys(x: np.ndarray) -> np.ndarray:
    """Return Keys' cubic convolution kernel (1981) at `x`, as PyTorch evaluates it."""
    x = np.abs(x)
    near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _CUBIC
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
