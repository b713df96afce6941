"""Rendered first-person scenes as a source: unlimited, free of licences, and with answers known to be right."""

import random
from collections.abc import Iterator

from firstsight.core.params import Data
from firstsight.data.records import Record, Sample
from firstsight.sources import scenes
from firstsight.sources.media import encode

# Dense answers, from which a model learns to see and to search.
DESCRIBE, INVENTORY = "Describe what you see.", "Where is each thing?"


def read(data: Data) -> Iterator[tuple[Sample, str | None]]:
    """`data.synthetic.scenes` samples: one picture each, described twice and then asked about.

    A scene depends on the seed and its own number alone, so that more scenes leave the earlier ones as they were.
    """
    for number in range(data.synthetic.scenes):
        rng = random.Random(f"{data.seed}:{number}")
        scene = scenes.sample_scene(rng)
        picture = encode(scenes.render(scene, rng), data)
        asked = [
            ("description", DESCRIBE, scenes.describe(scene)),
            ("inventory", INVENTORY, scenes.inventory(scene)),
            *scenes.questions(scene, rng, data.synthetic.questions_per_scene),
        ]
        name = f"scene-{number:06d}"
        records = tuple(
            Record(id=f"{name}-{place}", question=question, answer=answer, answers=(answer,), question_type=kind)
            for place, (kind, question, answer) in enumerate(asked)
        )
        yield (
            Sample(
                id=name, group=name, source="synthetic", media_kind="image", frames=(picture,), fps=0.0, records=records
            ),
            None,
        )
