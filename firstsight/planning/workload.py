"""Estimate the data: samples, frames, patches and tokens, from the built data set or from its settings.

Patches and visual tokens follow from frame sizes as in the processors, with frames assumed to be square. Text is
counted as four characters per token, about the average of Qwen2's tokenizer on English.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from pydantic import ValidationError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.image_processing_utils import select_best_resolution

from firstsight.core import yaml12
from firstsight.core.errors import UserError
from firstsight.core.files import read_json
from firstsight.core.params import PARAMS_FILE, Data
from firstsight.records.parquet import Split
from firstsight.records.sample import SPLITS, Record, Sample, Text

DATA, LOCK = Path("data/egoqa"), Path("dvc.lock")

# Tokens of the system prompt and chat turns of a sequence, and those that each question adds to it.
_TEMPLATE, _TURN = 24, 6
_CHARACTERS = 4
# Assumed while no data set is built: the samples, each a video of maximal size with one question, and its tokens; and
# the tokens of a text that is not cut, and of a question with one.
_SAMPLES, _QUESTION, _ANSWER, _TEXT = 1000, 32, 16, 256
_PLANNED = "Qwen2-VL, Qwen2.5-VL, LLaVA-OneVision or EgoGPT"
# Bytes per pixel of a photograph as JPEG of quality 90.
_PIXEL_BYTES = 0.4
_USES = {"train": "train", "validation": "validate", "test": "test"}
# Samples of the train split from which the mean and the largest sizes are taken.
_LOOKED_AT = 200


@dataclass(frozen=True)
class Sizes:
    """Hold the size of one sample: its frames, the `pixels` of each, its questions, tokens per question and answer."""

    kind: str
    frames: float
    pixels: float
    questions: float
    question_tokens: float
    answer_tokens: float

    def alone(self) -> "Sizes":
        """Return the size with a single question, as evaluation asks it."""
        return Sizes(self.kind, self.frames, self.pixels, 1, self.question_tokens, self.answer_tokens)


@dataclass(frozen=True)
class Workload:
    """Hold the size of a data set: samples and questions by split, the typical sample (for time), the largest (memory).

    `source` says where the numbers come from; `disk` is the size of the data set in bytes.
    """

    source: str
    samples: dict[str, float]
    questions: dict[str, float]
    typical: Sizes
    largest: Sizes
    disk: float


def workload(data: Data, path: Path, *, text_alone: bool = False) -> Workload:
    """Count data/egoqa if `path` is params.yaml, from whose settings it was built; else estimate from `data`.

    `text_alone` says that no model can take media, so that there are none.
    """
    card, earlier = DATA / "card.json", ""
    if path == PARAMS_FILE and card.is_file():
        if _built_from(data, read_json(card, "build-egoqa-dataset")):
            return _built(read_json(card, "build-egoqa-dataset"))
        earlier = f"; {DATA} was built earlier, with other settings"
    held_out = {"validation": data.validation_fraction, "test": data.test_fraction}
    shares = {"train": 1 - sum(held_out.values()), **held_out}
    wanted = {split: getattr(data, f"{split}_samples") for split in shares}
    if data.source == "synthetic":
        # Imported here because readers need video and data set libraries, which a machine for benchmarks may lack.
        from firstsight.planning import preview

        shown = list(preview.samples(data, 32))
        samples, (typical, largest) = data.synthetic.scenes, _sizes(shown)
        source = f"{samples:,} rendered scenes"
        frame_bytes = sum(len(frame) for one in shown for frame in one.frames) / len(shown)
    elif text_alone or data.source == "text" or _without_media(data):
        asked = data.max_tokens is None and data.source != "text" and not (data.hub and "text" in data.hub.fields)
        typical = largest = Sizes("none", 0, 0, 1, *((_TEXT, _ANSWER) if asked else (1, data.max_tokens or _TEXT)))
        samples = max(_SAMPLES, *(math.ceil((wanted[split] or 0) / share) for split, share in shares.items() if share))
        what = f"questions of {_TEXT} tokens" if asked else f"texts of {typical.answer_tokens} tokens"
        source, frame_bytes = f"not built yet; assumed {samples:,} {what}", 0
    else:
        typical = largest = Sizes("video", data.max_frames, data.max_pixels, 1, _QUESTION, _ANSWER)
        # Enough for the number of samples that the settings take.
        samples = max(_SAMPLES, *(math.ceil((wanted[split] or 0) / share) for split, share in shares.items() if share))
        source = (
            f"not built yet; assumed {samples:,} videos of {data.max_frames} frames of {data.max_pixels:,} pixels, "
            "a question each"
        )
        frame_bytes = _PIXEL_BYTES * data.max_frames * data.max_pixels
    questions = {split: samples * share * typical.questions for split, share in shares.items()}
    # A split with no share, of which samples are asked for, is one of the data set's own.
    questions = {split: min(count or math.inf, wanted[split] or count) for split, count in questions.items()}
    counts = {split: count / typical.questions for split, count in questions.items()}
    taken = ", ".join(f"{wanted[split]:,} to {use}" for split, use in _USES.items() if wanted[split])
    source += f"; {taken}" if taken else ""
    return Workload(source + earlier, counts, questions, typical, largest, sum(counts.values()) * frame_bytes)


def _without_media(data: Data) -> bool:
    """Return whether no column is an image or a video, of a data set of the hub or of a CSV file that is there."""
    if data.source == "hub":
        return not {"image", "images", "video"} & data.hub.fields.keys()
    if data.source != "csv" or not (file := Path(data.path)).is_file():
        return False
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines, suppress(csv.Error):
        return "media" not in map(str.strip, next(csv.reader(lines), []))
    return False  # building the data set says what is wrong with the file


def text_workload(source: str, samples: Sequence[Sample], counts: Mapping[str, float]) -> Workload:
    """Return the size of text that has been read, and is not built yet, with one question a sample.

    Args:
        source: says where it comes from.
        samples: those that the typical and the largest sizes are taken from.
        counts: samples of each split.
    """
    typical, largest = _sizes(samples)
    size = _CHARACTERS * (typical.question_tokens + typical.answer_tokens) * sum(counts.values())
    return Workload(source, {**counts}, {**counts}, typical, largest, size)


def _built_from(data: Data, card: dict) -> bool:
    """Return whether the data set was built from these settings, according to dvc.lock or else its card."""
    try:
        stages = yaml12.load(LOCK)["stages"]
        return Data.model_validate(stages["build-egoqa-dataset"]["params"]["params.yaml"]["data"]) == data
    except (FileNotFoundError, UserError, KeyError, TypeError):  # not built by DVC
        return card["source"] == data.source
    except ValidationError:  # written by another version
        return False


def _built(card: dict) -> Workload:
    """Return the size of the data set in data/egoqa."""
    samples, questions = ({s: card["splits"][s][what] for s in SPLITS} for what in ("samples", "records"))
    split = Split(DATA / "train.parquet")
    step = max(1, len(split) // _LOOKED_AT)
    typical, largest = _sizes(split[index] for index in range(0, len(split), step))
    source = f"{DATA}, {sum(questions.values()):,} questions about {sum(samples.values()):,} media"
    disk = sum(path.stat().st_size for path in DATA.iterdir())
    return Workload(source, samples, questions, typical, largest, disk)


def _sizes(samples: Iterable[Sample]) -> tuple[Sizes, Sizes]:
    """Return the mean and the maximum of each size over the samples, which are all counted as the commonest kind.

    The maxima need not be of the same sample.
    """
    kinds, rows = [], []
    for sample in samples:
        width, height = Image.open(io.BytesIO(sample.frames[0])).size if sample.frames else (0, 0)
        count = len(sample.records)
        question = sum(len(record.prompt()) for record in sample.records) / count / _CHARACTERS + _TURN
        answer = sum(map(_answer_tokens, sample.records)) / count
        kinds.append(sample.media_kind)
        rows.append((len(sample.frames), width * height, count, question, answer))
    kind = max(set(kinds), key=kinds.count)
    columns = list(zip(*rows, strict=True))
    return Sizes(kind, *(sum(column) / len(rows) for column in columns)), Sizes(kind, *map(max, columns))


def _answer_tokens(record: Record) -> float:
    """Estimate the tokens of an answer, end of turn included, or of a text as far as it is read."""
    tokens = len(record.answer) / _CHARACTERS + 1
    return min(tokens, record.max_tokens) if isinstance(record, Text) and record.max_tokens else tokens


def patches_and_tokens(model: PreTrainedModel, sizes: Sizes) -> tuple[float, float]:
    """Return the patches and the tokens of a sample with all its questions packed into one sequence.

    Raises:
        UserError: it is not known here how the model turns pixels into tokens.
    """
    patches, visual = _visual(model.config, sizes)
    return patches, _TEMPLATE + visual + sizes.questions * (sizes.question_tokens + sizes.answer_tokens)


def visual_tokens(model: PreTrainedModel, sizes: Sizes) -> float:
    """Return those of a sample's tokens that are visual, or EgoGPT's of speech."""
    return _visual(model.config, sizes)[1]


def reads_text_alone(config: PretrainedConfig) -> bool:
    """Return whether a model has no vision tower."""
    return not hasattr(config, "vision_config")


def _visual(config: PretrainedConfig, sizes: Sizes) -> tuple[float, float]:
    """Return patches and tokens of the frames, with the tokens of silent speech for EgoGPT."""
    if reads_text_alone(config) or not sizes.frames:
        return 0, 0
    vision, kind = config.vision_config, config.model_type
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        # A video's frames are merged in pairs; an image is a pair with itself.
        frames = sizes.frames / vision.temporal_patch_size if sizes.kind == "video" else sizes.frames
        patches = frames * sizes.pixels / vision.patch_size**2
        return patches, patches / vision.spatial_merge_size**2
    if kind not in ("llava_onevision", "egogpt"):
        raise UserError(
            f"models: expected {_PLANNED}, whose visual tokens can be planned, or a model that reads text alone, "
            f"found {kind}"
        )
    side, egogpt = vision.image_size // vision.patch_size, kind == "egogpt"
    if sizes.kind == "video":
        patches, tokens = sizes.frames * side**2, sizes.frames * math.ceil(side / 2) ** 2 + 1
        if egogpt and config.newline_position == "grid":
            tokens = sizes.frames * (side // 2) * (side // 2 + 1)
        elif egogpt:
            tokens = sizes.frames * (side // 2) ** 2 + 1
    elif egogpt and sizes.kind == "frames":
        # Each frame whole, with a newline.
        patches, tokens = sizes.frames * side**2, sizes.frames * (side**2 + 1)
    else:
        patches, tokens = (sizes.frames * one for one in _tiled(config, sizes.pixels))
    return patches, tokens + (config.speech_tokens if egogpt else 0)


def _tiled(config: PretrainedConfig, pixels: float) -> tuple[int, int]:
    """Return patches and tokens of an image for LLaVA-OneVision, which sees it whole and in tiles.

    The tiles are those of the best resolution, without padding, with a newline after each row, and downscaled to the
    number of patches that the config allows.
    """
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    grid = select_best_resolution((math.sqrt(pixels),) * 2, config.image_grid_pinpoints)
    rows, columns = (length // vision.image_size for length in grid)
    # A square image fills the shorter side; padding is removed symmetrically.
    shorter, longer = sorted((rows * side, columns * side))
    longer -= (longer - shorter) // 2 * 2
    height, width = (longer, shorter) if rows > columns else (shorter, longer)
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    if (ratio := math.sqrt(height * width / (most * side**2))) > 1.1:
        height, width = int(height // ratio), int(width // ratio)
    return (1 + rows * columns) * side**2, side**2 + height * (width + 1)
