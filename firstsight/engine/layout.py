"""Describe an exported folder: graphs and tokenizer, and `exported.json`, which says how they are run."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from firstsight.core.errors import UserError
from firstsight.core.files import read_json, write_json
from firstsight.core.validation import describe

# Raised when a folder written before can no longer be run as it is.
VERSION = 2
LAYOUT, CHAT_TEMPLATE, TOKENIZER = "exported.json", "chat_template.jinja", "tokenizer.json"
# Files of graphs: the operators, and the weights beside them.
GRAPH_FILES = ("*.onnx", "*.onnx.data")
VISION, EMBEDDINGS, DECODER, ENCODER = "vision.onnx", "embeddings.onnx", "decoder.onnx", "encoder.onnx"

_REMEDY = "export the model again (dvc repro)"


class Part(BaseModel):
    """Refuse keys that this version does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Pictures(Part):
    """Say how Qwen2-VL's processor turns images and clips into patches, and which tokens stand for them.

    `image_pixels` and `video_pixels` are the fewest and the most pixels of an image or of a frame.
    """

    image_token: int
    video_token: int
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale_factor: float
    image_pixels: tuple[int, int]
    video_pixels: tuple[int, int]


class Check(Part):
    """Hold how the exported model compared with the original on `questions` questions when it was made.

    `same_answers` of its greedy answers had the same tokens; `logit_difference` is the largest of the first token's
    logits. Of a model that scores classes, these are its best classes, and the scores.
    """

    questions: int
    same_answers: int
    logit_difference: float


class LayerError(Part):
    """Hold the relative error |x W' - x W| / |x W| of a 4-bit matrix W', over inputs x of the calibration questions.

    That of visual and that of text tokens, as the matrix is stored, and as it would be if rounded to the nearest. None
    stands for a kind of tokens of which none were read.
    """

    visual: float | None
    text: float | None
    visual_nearest: float | None
    text_nearest: float | None


class Layout(Part):
    """Hold the contents of exported.json.

    `weights` is the precision of the decoder's weights, or of an encoder's. `layers`, `kv_heads` and `head_dim` are the
    shape of the key-value cache: 0 of an encoder, which has none, and no `end_tokens`.
    `context` is the most tokens of a question with its answer. `special_tokens` are the variables that the chat
    template may use. `pictures` is None for a model of text alone. `errors` are those of 4-bit matrices, by name, where
    they were rounded by their inputs.

    `classes` are the names of those that the model scores; without any, it answers freely. `prompt` is the template of
    columns from which its questions were made, if they were.
    """

    version: Literal[2]
    weights: Literal["float32", "int8", "w4a8"]
    model_type: str
    parameters: int
    weights_bytes: int
    layers: int
    kv_heads: int
    head_dim: int
    context: int
    end_tokens: tuple[int, ...]
    pad_token: int
    special_tokens: dict[str, str]
    pictures: Pictures | None
    check: Check | None
    errors: dict[str, LayerError]
    classes: tuple[str, ...] = ()
    prompt: str | None = None

    @property
    def encoder(self) -> bool:
        """Return whether the model is an encoder, which has one graph."""
        return self.layers == 0

    def write(self, folder: Path) -> None:
        """Write the folder's exported.json, without keys of classes where there are none."""
        write_json(folder / LAYOUT, self.model_dump(exclude_defaults=True))

    def summary(self) -> str:
        """Return in words how large the weights are, and how the exported model compared with the original."""
        size = f"{self.weights} weights of {self.weights_bytes / 1e6:.1f} MB{self._rounding()}"
        if self.check is None:
            return f"{size}; not compared, for want of questions"
        return (
            f"{size}; {self.check.same_answers} of {self.check.questions} answers are the original's, logits within "
            f"{self.check.logit_difference:.1e}"
        )

    def _rounding(self) -> str:
        """Return in words how far 4-bit matrices are from the original's on average, or nothing if that is unknown."""

        def mean(name: str) -> str:
            found = [value for one in self.errors.values() if (value := getattr(one, name)) is not None]
            return f"{sum(found) / len(found):.1%}" if found else "unknown"

        if not self.errors:
            return ""
        return (
            f", products with visual tokens {mean('visual')} and with text {mean('text')} off "
            f"({mean('visual_nearest')} and {mean('text_nearest')} if rounded to the nearest)"
        )


def is_exported(folder: Path) -> bool:
    """Return whether `folder` holds an exported model."""
    return (folder / LAYOUT).is_file()


def read_layout(folder: Path) -> Layout:
    """Read the folder's exported.json.

    Raises:
        UserError: it is broken, or of another version.
    """
    values = read_json(folder / LAYOUT, "export-student")
    found = values.get("version") if isinstance(values, dict) else None
    if found != VERSION:
        raise UserError(f"{folder / LAYOUT}: expected version {VERSION}, found {found!r}; {_REMEDY}")
    try:
        return Layout.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{folder / LAYOUT}: {describe(error)}; {_REMEDY}") from None


def missing_file(folder: Path, layout: Layout) -> str | None:
    """Return the name of a file that the folder lacks, or None."""
    needed = [EMBEDDINGS, DECODER, *([VISION] if layout.pictures else []), TOKENIZER, CHAT_TEMPLATE]
    if layout.encoder:
        needed = [ENCODER, TOKENIZER]
    return next((name for name in needed if not (folder / name).is_file()), None)
