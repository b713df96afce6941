"""Rendered first-person scenes as a source: unlimited, free of licences, and with answers known to be right."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from firstsight.core.params import Data, Synthetic
from firstsight.readers.media import encode
from firstsight.readers.problems import Problems
from firstsight.readers.source_record import Asked, DecodedMedia, source_record
from firstsight.records.sample import MediaKind
from firstsight.scenes.rendering import render
from firstsight.scenes.scene import Scene, describe, inventory, narrate, sample_scene
from firstsight.scenes.templates import Draw

# Of a clip: something happens every second.
FPS = 2.0


@dataclass(frozen=True)
class Rendered:
    """A scene by its number: it depends on the seed, its settings and that alone, so that more scenes move none."""

    number: int
    seed: int
    clip_fraction: float
    max_clip_frames: int

    @property
    def kind(self) -> MediaKind:
        return "video" if self.draw()[0].clip else "image"

    def key(self) -> str:
        return f"scene-{self.number:06d}"

    def group(self) -> tuple[str, ...]:
        return (self.key(),)

    def titles(self) -> tuple[str, ...]:
        return ()

    def origins(self) -> tuple[str, ...]:
        return self.group()

    def stamp(self) -> object:
        return [self.seed, self.clip_fraction, self.max_clip_frames]

    def draw(self) -> tuple[Scene, random.Random]:
        """The scene, and the generator that goes on from it."""
        rng = random.Random(f"{self.seed}:{self.number}")
        return sample_scene(rng, self.clip_fraction, self.max_clip_frames), rng

    def load(self, data: Data) -> DecodedMedia:
        scene, rng = self.draw()
        return DecodedMedia(tuple(encode(frame, data) for frame in render(scene, rng)), FPS if scene.clip else 0.0)


def read(data: Data, problems: Problems) -> Iterator[Asked]:
    """`data.synthetic.scenes` scenes: of each, dense answers, from which a model learns to see, then questions."""
    settings: Synthetic = data.synthetic
    draw = Draw()
    for number in range(settings.scenes):
        media = Rendered(number, data.seed, settings.clip_fraction, settings.max_clip_frames)
        scene, _ = media.draw()
        rng = random.Random(f"{data.seed}:{number}:questions")
        for name, kind, text, answer in _dense(scene):
            yield _asked(media, name, question=text, answer=answer, question_type=kind)
        for one in draw.questions(scene, rng, settings.questions_per_scene, settings.option_fraction):
            yield _asked(
                media,
                one.template.name,
                question=one.question,
                answer=one.answer,
                options=one.options,
                question_type=one.template.question_type,
            )


def _asked(media: Rendered, template: str, **values: object) -> Asked:
    name = f"{media.key()}-{template}"
    return Asked(source_record(name, id=name, **values), media)


def _dense(scene: Scene) -> list[tuple[str, str, str, str]]:
    """Name, type, question and answer of what tells all of a scene."""
    if not scene.clip:
        return [
            ("description", "description", "Describe what you see.", describe(scene.first)),
            ("inventory", "inventory", "Where is each thing?", inventory(scene.first)),
        ]
    return [
        ("description-first", "description", "Describe what you see at first.", describe(scene.first)),
        ("description-end", "description", "Describe what you see at the end.", describe(scene.last)),
        ("narration", "narration", "What happens?", narrate(scene)),
    ]
