"""Rendered first-person scenes whose truth is known.

A scene is what a person looking down at a table sees: two hands reaching in from below, each holding an object or
nothing, and three places on the table, each with an object or nothing. Answers come from the scene's own objects,
never from the picture, and the picture is all a model is given: without looking, the best it can do is guess the
commonest answer to each question.
"""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

KINDS = ("cup", "book", "bottle", "ball", "phone", "pan")
COLOURS = {"red": (208, 48, 44), "green": (44, 150, 62), "blue": (48, 84, 204), "yellow": (236, 196, 40)}
# Place of an object -> its centre, as fractions of the picture. At 84 pixels the picture is 3 x 3 visual tokens of
# 28 pixels, and an object is about one of them.
HANDS = {"left hand": (1 / 6, 0.62), "right hand": (5 / 6, 0.62)}
TABLE = {"left side": (1 / 6, 0.22), "middle": (1 / 2, 0.22), "right side": (5 / 6, 0.22)}
PLACES = {**HANDS, **TABLE}
NUMBERS = ("zero", "one", "two", "three", "four", "five")


@dataclass(frozen=True)
class Thing:
    """An object: its kind and its colour, by name."""

    kind: str
    colour: str

    def __str__(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """What lies where. Every key of `PLACES` is present; None marks an empty place. No two things share a kind."""

    things: dict[str, Thing | None]

    def present(self) -> dict[str, Thing]:
        return {place: thing for place, thing in self.things.items() if thing}


def sample_scene(rng: random.Random) -> Scene:
    """Draw a scene. Each place is filled with probability 0.7; kinds differ, so that "the cup" names one thing."""
    kinds = rng.sample(KINDS, len(PLACES))
    colours = rng.choices(list(COLOURS), k=len(PLACES))
    filled = [rng.random() < 0.7 for _ in PLACES]
    return Scene(
        {
            place: Thing(kind, colour) if full else None
            for place, kind, colour, full in zip(PLACES, kinds, colours, filled, strict=True)
        }
    )


def render(scene: Scene, rng: random.Random, size: int = 84) -> Image.Image:
    """Draw the scene as an RGB image of `size` x `size` pixels, at four times the size and then reduced (smooth edges).

    `rng` moves each object by up to 3% of the picture and varies light and table, so that pixels do not repeat.
    """
    scale = 4 * size
    light = rng.uniform(0.85, 1.1)
    wall, table = rng.choice(((176, 190, 200), (200, 190, 176))), rng.choice(((150, 112, 78), (188, 160, 126)))
    picture = Image.new("RGB", (scale, scale), _lit(wall, light))
    draw = ImageDraw.Draw(picture)
    draw.polygon(_scaled([(0.06, 0.06), (0.94, 0.06), (1.0, 1.0), (0.0, 1.0)], scale), fill=_lit(table, light))
    skin = _lit(rng.choice(((236, 196, 168), (196, 144, 108), (124, 84, 60))), light)
    for place, (x, y) in PLACES.items():
        x, y = x + rng.uniform(-0.03, 0.03), y + rng.uniform(-0.03, 0.03)
        if place in HANDS:
            _draw_hand(draw, x, y, scale, skin)
        if thing := scene.things[place]:
            _draw_thing(draw, thing, x, y, scale, light)
    return picture.resize((size, size), Image.Resampling.BOX)


def _lit(colour: tuple[int, int, int], light: float) -> tuple[int, int, int]:
    return tuple(min(255, round(channel * light)) for channel in colour)


def _scaled(points: list[tuple[float, float]], scale: int) -> list[tuple[float, float]]:
    return [(x * scale, y * scale) for x, y in points]


def _draw_hand(draw: ImageDraw.ImageDraw, x: float, y: float, scale: int, skin: tuple[int, int, int]) -> None:
    """A forearm from the lower edge and a fist below the object it holds."""
    elbow = x + (x - 0.5) * 0.2
    arm = [(x - 0.06, y + 0.2), (x + 0.06, y + 0.2), (elbow + 0.11, 1.0), (elbow - 0.11, 1.0)]
    draw.polygon(_scaled(arm, scale), fill=skin)
    draw.ellipse([(x - 0.12) * scale, (y + 0.1) * scale, (x + 0.12) * scale, (y + 0.3) * scale], fill=skin)


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, scale: int, light: float) -> None:
    """One object of about a third of the picture's width, in its colour, with a dark outline and one white detail."""
    fill, dark, white = _lit(COLOURS[thing.colour], light), (30, 26, 24), (244, 244, 240)
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


def describe(scene: Scene) -> str:
    """The whole scene in words, in a fixed order of places: the dense answer from which a model learns to see."""
    return ", ".join(f"{place} {thing or 'nothing'}" for place, thing in scene.things.items())


def inventory(scene: Scene) -> str:
    """Every kind, in a fixed order, with its colour and place or none: the dense answer that teaches to search."""
    found = {thing.kind: f"{thing.colour} {place}" for place, thing in scene.present().items()}
    return ", ".join(f"{kind} {found.get(kind, 'none')}" for kind in KINDS)


def questions(scene: Scene, rng: random.Random, count: int) -> list[tuple[str, str, str]]:
    """`count` different questions about the scene as (question type, question, answer), drawn evenly over the types."""
    by_type = _all_questions(scene, rng)
    chosen: list[tuple[str, str, str]] = []
    while len(chosen) < count and by_type:
        for question_type in rng.sample(sorted(by_type), len(by_type)):
            options = by_type[question_type]
            question, answer = options.pop(rng.randrange(len(options)))
            chosen.append((question_type, question, answer))
            if not options:
                del by_type[question_type]
    return chosen[:count]


def _all_questions(scene: Scene, rng: random.Random) -> dict[str, list[tuple[str, str]]]:
    present, counted = (
        scene.present(),
        {
            name: sum(scene.things[p] is not None for p in group)
            for name, group in (("hands", HANDS), ("table", TABLE), ("all", PLACES))
        },
    )
    by_type = {
        "held object": [(f"What is in your {hand}?", _kind(scene.things[hand])) for hand in HANDS],
        "object at place": [
            (f"What is on the {_side(place)} of the table?", _kind(scene.things[place])) for place in TABLE
        ],
        "colour at place": [
            (f"What colour is the thing {_where(place)}?", thing.colour) for place, thing in present.items()
        ],
        "colour of object": [(f"What colour is the {thing.kind}?", thing.colour) for thing in present.values()],
        "location": [(f"Where is the {thing.kind}?", place) for place, thing in present.items()],
        "count": [
            ("How many things are on the table?", NUMBERS[counted["table"]]),
            ("How many things do you hold?", NUMBERS[counted["hands"]]),
            ("How many things can you see?", NUMBERS[counted["all"]]),
        ],
        "presence": [_presence(scene, rng)],
    }
    return {name: options for name, options in by_type.items() if options}


def _presence(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Is there such a thing? Yes half the time; a wrong one differs in kind or in colour."""
    present = list(scene.present().values())
    if present and rng.random() < 0.5:
        return f"Do you see a {rng.choice(present)}?", "yes"
    absent = [thing for kind in KINDS for colour in COLOURS if (thing := Thing(kind, colour)) not in present]
    return f"Do you see a {rng.choice(absent)}?", "no"


def _kind(thing: Thing | None) -> str:
    return thing.kind if thing else "nothing"


def _side(place: str) -> str:
    return place


def _where(place: str) -> str:
    return f"in your {place}" if place in HANDS else f"on the {place} of the table"
