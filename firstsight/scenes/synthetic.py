"""Generate questions about rendered first-person scenes: unlimited, free of licences, with correct answers."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from firstsight.core.params import Data, Synthetic
from firstsight.readers.image_decoding import encode
from firstsight.readers.problems import Problems
from firstsight.readers.source_record import Asked, DecodedMedia, source_record
from firstsight.records.sample import MediaKind
from firstsight.scenes.rendering import render
from firstsight.scenes.scene import Scene, describe, inventory, narrate, sample_scene
from firstsight.scenes.templates import Draw

# The frames per second of a clip. Each state is two frames, so there is an event every second.
FPS = 2.0


@dataclass(frozen=True)
class Rendered:
    """Render a scene that depends only on its number, the seed and the settings: adding scenes changes no other."""

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
        """Return the scene, and the random generator in its state after sampling it, from which it is rendered."""
        rng = random.Random(f"{self.seed}:{self.number}")
        return sample_scene(rng, self.clip_fraction, self.max_clip_frames), rng

    def load(self, data: Data) -> DecodedMedia:
        scene, rng = self.draw()
        return DecodedMedia(tuple(encode(frame, data) for frame in render(scene, rng)), FPS if scene.clip else 0.0)


def read(data: Data, problems: Problems) -> Iterator[Asked]:
    """Yield the questions of `data.synthetic.scenes` scenes: of each, those with dense answers, then templates'.

    Only questions of `data.synthetic.types` are asked; a scene of which none can be asked is left out.
    """
    settings: Synthetic = data.synthetic
    draw = Draw(settings.types)
    for number in range(settings.scenes):
        media = Rendered(number, data.seed, settings.clip_fraction, settings.max_clip_frames)
        scene, _ = media.draw()
        rng = random.Random(f"{data.seed}:{number}:questions")
        for name, kind, text, answer in _dense(scene):
            if kind in settings.types:
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
    """Return name, type, question and answer of the questions whose dense answers describe a whole scene."""
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
