"""The size to which pictures are resized for Qwen2-VL, when the data set is built and by the model's processor."""

import math

# Pictures with one side more than this many times as long as the other are refused.
MOST_RATIO = 200


def fitted_size(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Return height and width as multiples of `factor`, of `least` to `most` pixels, as near the ratio as they can be.

    This is the rule of Qwen2-VL's image processor (`smart_resize`). A side is never below `factor`, so that long
    pictures may have more pixels than `most`.

    Raises:
        ValueError: one side is more than 200 times as long as the other.
    """
    if max(height, width) > MOST_RATIO * min(height, width):
        raise ValueError(f"sides of {width} x {height} pixels, of which one is over {MOST_RATIO} times the other")
    sides = [round(side / factor) * factor for side in (height, width)]
    if math.prod(sides) > most:
        shrink = math.sqrt(height * width / most)
        sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
    elif math.prod(sides) < least:
        grow = math.sqrt(least / (height * width))
        sides = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return sides[0], sides[1]
