"""Score classes with an exported folder: by a decoder, which reads the wording of each, or by an encoder.

As in `firstsight.packing.forward`, a decoder's score is the log-probability of a class's name and the end token.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from firstsight.core.errors import UserError
from firstsight.engine.exported_model import ExportedModel
from firstsight.engine.layout import ENCODER, TOKENIZER, read_layout
from firstsight.engine.prompts import Batch, Question

# Names that are read together, each behind a copy of its question's keys and values, if one question has no more.
_ROWS = 64


def open_exported(folder: Path, engine: str = "onnxruntime") -> ExportedModel:
    """Load an exported folder in an engine, to answer freely, or by the best of the classes that its layout names.

    Raises:
        UserError: as for `ExportedModel`.
    """
    layout = read_layout(folder)
    if layout.encoder:
        return Encoder(folder, engine)
    return ScoringDecoder(folder, engine) if layout.classes else ExportedModel(folder, engine)


class ClassModel(ExportedModel, ABC):
    """Load an exported folder whose answer is the class with the highest score; nothing is generated."""

    @abstractmethod
    def scores(self, batch: Batch) -> np.ndarray:
        """Return the scores [B, C] of the classes for each question.

        Raises:
            UserError: a question with a class is longer than the model's context.
        """

    def classify(self, questions: Sequence[Question]) -> list[tuple[str, float]]:
        """Return the class of the highest score of each question, and its probability among the classes."""
        scores = self.scores(self.inputs(questions))
        shares = np.exp(_log_softmax(scores)).max(axis=1).tolist()
        return [(self.layout.classes[best], share) for best, share in zip(scores.argmax(axis=1), shares, strict=True)]

    def answers(self, questions: Sequence[Question], batch_size: int, max_new_tokens: int) -> Iterator[str]:
        """Yield the name of the best class of each question; `max_new_tokens` cuts none."""
        for start in range(0, len(questions), batch_size):
            yield from (name for name, _ in self.classify(questions[start : start + batch_size]))

    def generate(self, batch: Batch, tokens: int) -> np.ndarray:
        """Return the scores [B, C], whatever the number of tokens; for timing."""
        return self.scores(batch)

    def first_logits(self, batch: Batch) -> np.ndarray:
        """Return the scores [B, C]: by them, an export is compared with its original."""
        return self.scores(batch)


class ScoringDecoder(ClassModel):
    """Load an exported language model that scores the names of classes."""

    def _open(self) -> int:
        read = super()._open()
        end = self.layout.special_tokens["eos_token"]
        wordings = [self._prompts.tokens_of(name + end) for name in self.layout.classes]
        self._lengths = np.array([len(one) for one in wordings])
        # [C, L]
        self._wordings = np.full((len(wordings), max(self._lengths)), self.layout.pad_token, np.int64)
        for row, tokens in zip(self._wordings, wordings, strict=True):
            row[: len(tokens)] = tokens
        return read

    def scores(self, batch: Batch) -> np.ndarray:
        count, length = batch.tokens.shape
        _check_length(self, length + self._wordings.shape[1])
        logits, past = self._step(self._embedded(batch), batch.positions, batch.mask, self._no_past(count))
        size = max(1, _ROWS // len(self._wordings))
        parts = [slice(start, start + size) for start in range(0, count, size)]
        last = batch.positions[..., -1:]
        return np.concatenate(
            [
                self._scores_after(logits[some], [one[some] for one in past], last[..., some, :], batch.mask[some])
                for some in parts
            ]
        )

    def _scores_after(
        self, logits: np.ndarray, past: list[np.ndarray], positions: np.ndarray, mask: np.ndarray
    ) -> np.ndarray:
        """Return the scores [n, C] of all classes after n questions.

        Args:
            logits: [n, V] of the first token after each question.
            past: keys and values [n, kv_heads, P, D] of each layer.
            positions: of the questions' last tokens, [n, 1], or [3, n, 1] for Qwen2-VL.
            mask: [n, P].
        """
        count, classes = len(logits), len(self._wordings)
        found = _log_softmax(logits)[:, self._wordings[:, 0]]
        # Names are read a token at a time, because the graph gives the logits after the last one alone.
        past = [np.repeat(one, classes, axis=0) for one in past]
        positions, mask = np.repeat(positions, classes, axis=-2), np.repeat(mask, classes, axis=0)
        for place in range(1, self._wordings.shape[1]):
            positions, mask = positions + 1, np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
            read = np.tile(self._wordings[:, place - 1], count)[:, None]
            logits, past = self._step(self._embeddings.run({"tokens": read})[0], positions, mask, past)
            following = np.tile(self._wordings[:, place], count)[:, None]
            # What comes after a name's end is read with the longer names, and does not count.
            scores = np.take_along_axis(_log_softmax(logits), following, axis=1).reshape(count, classes)
            found = found + np.where(place < self._lengths, scores, 0)
        return found

    def decode(self, batch: Batch, max_new_tokens: int) -> list[list[int]]:
        """Return the tokens of each question's best class, without the end token."""
        best = self.scores(batch).argmax(axis=1)
        return [self._wordings[number, : self._lengths[number] - 1].tolist() for number in best]


class Encoder(ClassModel):
    """Load an exported encoder, which has one graph, from tokens to a logit for each class."""

    def _open(self) -> int:
        try:
            self._tokenizer = Tokenizer.from_file(str(self.folder / TOKENIZER))
        except Exception as error:  # the tokenizers library raises nothing more specific
            raise UserError(
                f"{self.folder}: expected a tokenizer, found {str(error)[:200]}; export the model again (dvc repro)"
            ) from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._encoder = self._graph(ENCODER)
        return self._bytes(ENCODER)

    def inputs(self, questions: Sequence[Question]) -> Batch:
        """Return the prompts' tokens between the encoder's own special tokens, padded on the right.

        Raises:
            UserError: a sample has media.
        """
        for sample, _ in questions:
            if sample.frames:
                raise UserError(
                    f"{sample.id}: expected records without media, because an encoder reads text alone, found "
                    f"{sample.media_kind}; take a vision-language model, or data without media"
                )
        rows = [one.ids for one in self._tokenizer.encode_batch([record.prompt() for _, record in questions])]
        tokens = np.full((len(rows), max(map(len, rows))), self.layout.pad_token, np.int64)
        mask = np.zeros_like(tokens)
        for number, row in enumerate(rows):
            tokens[number, : len(row)], mask[number, : len(row)] = row, 1
        return Batch(tokens, mask, np.cumsum(mask, axis=1) - 1, (), ())

    def scores(self, batch: Batch) -> np.ndarray:
        _check_length(self, batch.tokens.shape[1])
        return self._encoder.run({"tokens": batch.tokens, "mask": batch.mask})[0]

    def read(self, question: Question, tokens: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return what the graph takes to read a question, and where visual tokens are: nowhere, as booleans [S]."""
        batch = self.inputs([question])
        return {"tokens": batch.tokens, "mask": batch.mask}, np.zeros(batch.tokens.shape[1], bool)


def _check_length(model: ExportedModel, length: int) -> None:
    if length > (most := model.layout.context):
        raise UserError(
            f"{model.folder}: expected at most {most} tokens of media, question and class, found {length}; "
            "shorten the question, or lower data.max_pixels or data.max_frames"
        )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the log-probabilities along the last axis."""
    above = logits - logits.max(axis=-1, keepdims=True)
    return above - np.log(np.exp(above).sum(axis=-1, keepdims=True))
