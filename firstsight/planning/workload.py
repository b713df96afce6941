"""How much there is to see and to read: samples, frames, patches and tokens, from the data set or from its settings.

Patches are exact, because processors make them from sizes alone. Text is counted as four characters a token, which is
about what Qwen2's tokenizer makes of English.
"""

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from transformers import PretrainedConfig, PreTrainedModel

from firstsight.core.errors import UserError
from firstsight.core.files import read_json
from firstsight.core.params import PARAMS_FILE, Data
from firstsight.data.records import SPLITS, Sample, Split
from firstsight.planning import preview

DATA = Path("data/egoqa")

# System prompt and turns, around media and question; and what a question of its own adds to a packed sequence.
_TEMPLATE, _TURN = 24, 6
_CHARACTERS = 4
# Where there is no data yet: samples in all, each a video of the most frames and pixels with one question.
_SAMPLES, _QUESTION, _ANSWER = 1000, 32, 16
# Of a split, to take the mean and the largest of.
_LOOKED_AT = 200

# LLaVA-OneVision shows an image whole and in up to nine tiles, and a frame of video pooled by two.
_TILES = 10


@dataclass(frozen=True)
class Sizes:
    """One sample: its media, `pixels` a frame, and the text of its questions, in tokens."""

    kind: str
    frames: float
    pixels: float
    questions: float
    question_tokens: float
    answer_tokens: float

    def alone(self) -> "Sizes":
        """One of its questions, as evaluation asks it."""
        return Sizes(self.kind, self.frames, self.pixels, 1, self.question_tokens, self.answer_tokens)


@dataclass(frozen=True)
class Workload:
    """A data set: samples and questions of each split, a typical sample (for time) and the largest (for memory)."""

    source: str
    samples: dict[str, float]
    questions: dict[str, float]
    typical: Sizes
    largest: Sizes


def workload(data: Data, path: Path) -> Workload:
    """Of data/egoqa, where it was built and `path` is params.yaml, which it was built from; else of the settings."""
    card = DATA / "card.json"
    if path == PARAMS_FILE and card.is_file() and read_json(card, "build-egoqa-dataset")["source"] == data.source:
        return _built(read_json(card, "build-egoqa-dataset"))
    if data.source == "synthetic":
        samples, typical, largest = data.synthetic.scenes, *_sizes(preview.samples(data, 32))
        source = f"{samples:,} rendered scenes"
    else:
        samples = _SAMPLES
        typical = largest = Sizes("video", data.max_frames, data.max_pixels, 1, _QUESTION, _ANSWER)
        source = (
            f"not built yet; assumed {samples:,} videos of {data.max_frames} frames of {data.max_pixels:,} pixels, "
            "a question each"
        )
    held_out = {"validation": data.validation_fraction, "test": data.test_fraction}
    shares = {"train": 1 - sum(held_out.values()), **held_out}
    counts = {split: samples * share for split, share in shares.items()}
    questions = {split: count * typical.questions for split, count in counts.items()}
    return Workload(source, counts, questions, typical, largest)


def _built(card: dict) -> Workload:
    samples, questions = ({s: card["splits"][s][what] for s in SPLITS} for what in ("samples", "records"))
    split = Split(DATA / "train.parquet")
    step = max(1, len(split) // _LOOKED_AT)
    typical, largest = _sizes(split[index] for index in range(0, len(split), step))
    source = f"{DATA}, {sum(questions.values()):,} questions about {sum(samples.values()):,} media"
    return Workload(source, samples, questions, typical, largest)


def _sizes(samples: Iterable[Sample]) -> tuple[Sizes, Sizes]:
    """The mean and the largest of samples, all taken to be of the commonest kind.

    Each size of the largest is the largest there is, whichever sample it is of.
    """
    kinds, rows = [], []
    for sample in samples:
        width, height = Image.open(io.BytesIO(sample.frames[0])).size if sample.frames else (0, 0)
        count = len(sample.records)
        question = sum(len(record.prompt()) for record in sample.records) / count / _CHARACTERS + _TURN
        answer = sum(len(record.answer) for record in sample.records) / count / _CHARACTERS + 1
        kinds.append(sample.media_kind)
        rows.append((len(sample.frames), width * height, count, question, answer))
    kind = max(set(kinds), key=kinds.count)
    columns = list(zip(*rows, strict=True))
    return Sizes(kind, *(sum(column) / len(rows) for column in columns)), Sizes(kind, *map(max, columns))


def patches_and_tokens(model: PreTrainedModel, sizes: Sizes) -> tuple[float, float]:
    """Of a sample, all its questions in one sequence: patches that the vision tower sees, and the sequence's tokens.

    Raises:
        UserError: how the model turns pixels into tokens is not known here.
    """
    patches, visual = _visual(model.config, sizes)
    return patches, _TEMPLATE + visual + sizes.questions * (sizes.question_tokens + sizes.answer_tokens)


def _visual(config: PretrainedConfig, sizes: Sizes) -> tuple[float, float]:
    vision = getattr(config, "vision_config", None)
    if config.model_type.startswith("qwen2_vl"):
        # A video's frames are merged in pairs; an image is a pair with itself.
        frames = sizes.frames / vision.temporal_patch_size if sizes.kind == "video" else sizes.frames
        patches = frames * sizes.pixels / vision.patch_size**2
        return patches, patches / vision.spatial_merge_size**2
    if config.model_type == "llava_onevision":
        side = vision.image_size // vision.patch_size
        if sizes.kind == "video":
            return sizes.frames * side**2, sizes.frames * math.ceil(side / 2) ** 2 + 1
        tiles = sizes.frames * _TILES
        return tiles * side**2, tiles * side**2
    raise UserError(
        f"models: expected Qwen2-VL or LLaVA-OneVision, whose visual tokens can be planned, found {config.model_type}"
    )
