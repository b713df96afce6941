"""Rendered first-person scenes as a source: unlimited, free of licences, and with answers known to be right."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from firstsight.core.params import Data
from firstsight.data.records import MediaKind
from firstsight.sources import scenes
from firstsight.sources.media import encode
from firstsight.sources.problems import Problems
from firstsight.sources.question import Asked, Pictures, question

# Dense answers, from which a model learns to see and to search.
DESCRIBE, INVENTORY = "Describe what you see.", "Where is each thing?"


@dataclass(frozen=True)
class Rendered:
    """A scene by its number: it depends on the seed and that alone, so that more scenes move none."""

    number: int
    seed: int
    kind: MediaKind = "image"

    def key(self) -> str:
        return f"scene-{self.number:06d}"

    def group(self) -> tuple[str, ...]:
        return (self.key(),)

    def stamp(self) -> object:
        return self.seed

    def draw(self) -> tuple[scenes.Scene, random.Random]:
        """The scene, and the generator that goes on from it."""
        rng = random.Random(f"{self.seed}:{self.number}")
        return scenes.sample_scene(rng), rng

    def load(self, data: Data) -> Pictures:
        return Pictures((encode(scenes.render(*self.draw()), data),))


def read(data: Data, problems: Problems) -> Iterator[Asked]:
    """`data.synthetic.scenes` scenes, each described twice and then asked about."""
    for number in range(data.synthetic.scenes):
        media = Rendered(number, data.seed)
        scene, _ = media.draw()
        rng = random.Random(f"{data.seed}:{number}:questions")
        found = [
            ("description", DESCRIBE, scenes.describe(scene)),
            ("inventory", INVENTORY, scenes.inventory(scene)),
            *scenes.questions(scene, rng, data.synthetic.questions_per_scene),
        ]
        for place, (kind, text, answer) in enumerate(found):
            name = f"{media.key()}-{place}"
            yield Asked(question(name, id=name, question=text, answer=answer, question_type=kind), media)
