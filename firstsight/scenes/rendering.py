"""Draw a scene, as `firstsight.scenes.scene` defines it, as a first-person image or the frames of a clip."""

import random
from collections.abc import Mapping

from PIL import Image, ImageDraw

from firstsight.scenes.scene import FRAMES_A_STATE, HANDS, PASS, PLACES, PUSH, SWAP, TABLE, Event, Scene, State, Thing

Point = tuple[float, float]
Colour = tuple[int, int, int]

# Centres, as fractions of the image. At 84 pixels the image is 3 x 3 visual tokens of 28 pixels, and an object is about
# one token in size.
CENTRES: Mapping[str, Point] = {
    "left hand": (1 / 6, 0.62),
    "right hand": (5 / 6, 0.62),
    "left side": (1 / 6, 0.22),
    "front": (1 / 2, 0.22),
    "right side": (5 / 6, 0.22),
}
PAINTS = {"red": (208, 48, 44), "green": (44, 150, 62), "blue": (48, 84, 204), "yellow": (236, 196, 40)}
# How far hands have moved towards their target in the last frame before an event, as a fraction of the way.
_REACH = 0.25


def render(scene: Scene, rng: random.Random, size: int = 84) -> list[Image.Image]:
    """Return the frames of a scene as RGB images of `size` x `size` pixels.

    An image is one frame. A clip has two frames a state, and in the second, the hands begin the next event. `rng`
    shifts each object by up to 3% of the image and the camera of a clip by up to 1% a frame, and varies light and
    colours, so that pixels do not repeat.
    """
    light = rng.uniform(0.85, 1.1)
    wall, table = rng.choice(((176, 190, 200), (200, 190, 176))), rng.choice(((150, 112, 78), (188, 160, 126)))
    skin = rng.choice(((236, 196, 168), (196, 144, 108), (124, 84, 60)))
    paints = {"wall": wall, "table": table, "skin": skin} | PAINTS
    paints = {name: tuple(min(255, round(channel * light)) for channel in paint) for name, paint in paints.items()}
    centres = {place: _near(centre, rng, 0.03) for place, centre in CENTRES.items()}
    if not scene.clip:
        return [_frame(scene.first, centres, paints, size)]
    frames = []
    for state, event in zip(scene.states, [*scene.events, None], strict=True):
        for moment in range(FRAMES_A_STATE):
            at_work = _reaching(centres, event) if event and moment == FRAMES_A_STATE - 1 else centres
            sway = _near((0.0, 0.0), rng, 0.01)
            swayed = {place: (x + sway[0], y + sway[1]) for place, (x, y) in at_work.items()}
            frames.append(_frame(state, swayed, paints, size))
    return frames


def _near(point: Point, rng: random.Random, distance: float) -> Point:
    return point[0] + rng.uniform(-distance, distance), point[1] + rng.uniform(-distance, distance)


def _reaching(centres: Mapping[str, Point], event: Event) -> dict[str, Point]:
    """Return the centres with the hands that perform the event moved towards their targets."""
    origin, goal = event.moves[0].origin, event.moves[0].goal
    if event.verb in (PASS, SWAP):
        aims = dict(zip(HANDS, reversed(HANDS), strict=True))
    elif event.verb == PUSH:
        aims = {HANDS[origin == TABLE[-1]]: origin}
    else:
        aims = {place: other for place, other in ((origin, goal), (goal, origin)) if place in HANDS}
    moved = {}
    for hand, aim in aims.items():
        (x, y), (to_x, to_y) = centres[hand], centres[aim]
        moved[hand] = (x + _REACH * (to_x - x), y + _REACH * (to_y - y))
    return dict(centres) | moved


def _frame(state: State, centres: Mapping[str, Point], paints: Mapping[str, Colour], size: int) -> Image.Image:
    """Draw one state at four times the size, and return it reduced to `size`, for smooth edges."""
    scale = 4 * size
    image = Image.new("RGB", (scale, scale), paints["wall"])
    draw = ImageDraw.Draw(image)
    draw.polygon(_scaled([(0.06, 0.06), (0.94, 0.06), (1.0, 1.0), (0.0, 1.0)], scale), fill=paints["table"])
    for place in reversed(PLACES):
        if place in HANDS:
            _draw_hand(draw, centres[place], CENTRES[place], scale, paints["skin"])
        if thing := state[place]:
            _draw_thing(draw, thing, centres[place], scale, paints[thing.colour])
    return image.resize((size, size), Image.Resampling.BOX)


def _scaled(points: list[Point], scale: int) -> list[Point]:
    return [(x * scale, y * scale) for x, y in points]


def _draw_hand(draw: ImageDraw.ImageDraw, centre: Point, rest: Point, scale: int, skin: Colour) -> None:
    """Draw a forearm from the lower edge of the image, and a fist below the object that it holds."""
    x, y = centre
    elbow = rest[0] + (rest[0] - 0.5) * 0.2
    arm = [(x - 0.06, y + 0.2), (x + 0.06, y + 0.2), (elbow + 0.11, 1.0), (elbow - 0.11, 1.0)]
    draw.polygon(_scaled(arm, scale), fill=skin)
    draw.ellipse([(x - 0.12) * scale, (y + 0.1) * scale, (x + 0.12) * scale, (y + 0.3) * scale], fill=skin)


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, centre: Point, scale: int, fill: Colour) -> None:
    """Draw an object about a third of the image wide, in its colour, with a dark outline and one contrasting detail."""
    (x, y), dark, white = centre, (30, 26, 24), (244, 244, 240)
    line, unit = max(1, scale // 84), scale * 4 / 3

    def box(left: float, top: float, right: float, bottom: float) -> list[float]:
        return [x * scale + left * unit, y * scale + top * unit, x * scale + right * unit, y * scale + bottom * unit]

    style = {"fill": fill, "outline": dark, "width": line}
    if thing.kind == "cup":
        draw.ellipse(box(0.03, -0.05, 0.15, 0.07), outline=fill, width=4 * line)
        draw.rectangle(box(-0.09, -0.1, 0.08, 0.12), **style)
        draw.ellipse(box(-0.09, -0.13, 0.08, -0.06), fill=white, outline=dark, width=line)
    elif thing.kind == "book":
        draw.rectangle(box(-0.13, -0.09, 0.13, 0.1), **style)
        draw.rectangle(box(-0.02, -0.09, 0.02, 0.1), fill=white)
    elif thing.kind == "bottle":
        draw.rectangle(box(-0.06, -0.04, 0.06, 0.13), **style)
        draw.rectangle(box(-0.025, -0.14, 0.025, -0.04), **style)
        draw.rectangle(box(-0.03, -0.16, 0.03, -0.12), fill=white, outline=dark, width=line)
    elif thing.kind == "ball":
        draw.ellipse(box(-0.12, -0.12, 0.12, 0.12), **style)
        draw.arc(box(-0.2, -0.12, 0.02, 0.12), -60, 60, fill=white, width=2 * line)
    elif thing.kind == "phone":
        draw.rounded_rectangle(box(-0.07, -0.13, 0.07, 0.13), radius=0.02 * unit, **style)
        draw.rectangle(box(-0.045, -0.1, 0.045, 0.07), fill=dark)
    else:  # pan
        draw.line(box(0, 0, 0.09, 0.14), fill=fill, width=5 * line)
        draw.ellipse(box(-0.13, -0.15, 0.05, 0.04), **style)
        draw.ellipse(box(-0.1, -0.12, 0.02, 0.01), outline=white, width=line)
