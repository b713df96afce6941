"""Answer questions from an exported folder: greedy decoding with a key-value cache, in batches.

Nothing here imports torch or transformers: `firstsight ask` runs where neither is installed.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import takewhile
from pathlib import Path

import numpy as np

from firstsight.core.errors import UserError
from firstsight.engine.layout import DECODER, EMBEDDINGS, VISION, missing_file, read_layout
from firstsight.engine.prompts import Batch, Prompts, Question
from firstsight.engine.runtimes import Graph, runtime


class ExportedModel:
    """Load an exported folder in `engine`, one of `params.Engine`; `layout` says what the folder holds.

    `weights_bytes` are the bytes of the weights, `token_bytes` of those that a token reads, the decoder's, and
    `parameters` the number of those of the model that was exported.

    Raises:
        UserError: the engine is not installed, or not for this device; the folder lacks a file, is of another version,
            or a graph is broken.
    """

    def __init__(self, folder: Path, engine: str = "onnxruntime"):
        self.folder, self.layout = folder, read_layout(folder)
        if (missing := missing_file(folder, self.layout)) is not None:
            raise UserError(
                f"{folder}: expected an exported model, found no {missing}; copy the folder again, or export it again "
                "(dvc repro)"
            )
        self._runtime = runtime(engine)
        self.weights_bytes, self.parameters = self.layout.weights_bytes, self.layout.parameters
        self.token_bytes = self._open()

    def _open(self) -> int:
        """Open tokenizer and graphs, and return the bytes of those weights that a token reads."""
        self._prompts = Prompts(self.folder, self.layout)
        self._embeddings, self._decoder = (self._graph(name) for name in (EMBEDDINGS, DECODER))
        self._vision = self._graph(VISION) if self.layout.pictures else None
        self._past = [name for name in self._decoder.inputs if name.startswith("past.")]
        return self._bytes(DECODER)

    def _graph(self, name: str) -> Graph:
        return self._runtime.open(self.folder / name)

    def _bytes(self, name: str) -> int:
        """Return the bytes of a graph with its weights."""
        return sum(path.stat().st_size for path in self.folder.glob(f"{name}*"))

    def answers(self, questions: Sequence[Question], batch_size: int, max_new_tokens: int) -> Iterator[str]:
        """Yield the greedy answers as text without special tokens, in the order of the questions.

        An answer ends at an end token, or after `max_new_tokens` tokens.

        Raises:
            UserError: a question with its media and answer is longer than the model's context.
        """
        for start in range(0, len(questions), batch_size):
            batch = self.inputs(questions[start : start + batch_size])
            yield from (self._prompts.text(tokens) for tokens in self.decode(batch, max_new_tokens))

    def inputs(self, questions: Sequence[Question]) -> Batch:
        """Return the model's inputs for a batch of questions."""
        return self._prompts.batch(questions)

    def decode(self, batch: Batch, max_new_tokens: int) -> list[list[int]]:
        """Return the greedy answer tokens of each question, without the end token."""
        ends = self.layout.end_tokens
        columns, ended = [], np.zeros(len(batch.tokens), bool)
        for chosen in self._chosen(batch, max_new_tokens):
            columns.append(chosen)
            ended |= np.isin(chosen, ends)
            if ended.all():
                break
        return [list(takewhile(lambda token: token not in ends, row)) for row in np.stack(columns, axis=1).tolist()]

    def generate(self, batch: Batch, tokens: int) -> np.ndarray:
        """Return exactly `tokens` greedy tokens [B, tokens] of each question, end tokens among them; for timing."""
        return np.stack(list(self._chosen(batch, tokens)), axis=1)

    def copying(self, size: int) -> Callable[[], None]:
        """Return a function that copies `size` bytes in memory, by one thread."""
        source = np.ones(size, np.uint8)
        target = np.empty_like(source)
        return lambda: np.copyto(target, source)

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, without special tokens around it."""
        return self._prompts.token_counts(texts)

    def environment(self) -> dict[str, str]:
        """Return what computes: the device's name with its threads, the engine with its version, the precision."""
        return {
            "device": self._runtime.device,
            "engine": self._runtime.name,
            "precision": self.layout.weights,
        }

    def first_logits(self, batch: Batch) -> np.ndarray:
        """Return the logits [B, V] of the first token of each answer."""
        logits, _ = self._step(self._embedded(batch), batch.positions, batch.mask, self._no_past(len(batch.tokens)))
        return logits

    def read(self, question: Question, tokens: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return what the decoder's graph takes to read a question with the model's answer of at most `tokens` tokens,
        and where visual tokens are, as booleans [S]."""
        batch = self.inputs([question])
        answer = np.array(self.decode(batch, tokens), np.int64)
        states = np.concatenate([self._embedded(batch), self._embeddings.run({"tokens": answer})[0]], axis=1)
        further = batch.positions[..., -1:] + 1 + np.arange(answer.shape[1])
        inputs = {
            "embeddings": states,
            "positions": np.concatenate([batch.positions, further], axis=-1),
            "mask": np.ones(states.shape[:2], np.int64),
            **dict(zip(self._past, self._no_past(1), strict=True)),
        }
        return inputs, self._prompts.visual(np.concatenate([batch.tokens, answer], axis=1))[0]

    def look(self, question: Question) -> list[dict[str, np.ndarray]]:
        """Return what the vision tower's graph takes for each of a question's media."""
        return [
            {"pixels": one.pixels, "positions": _patch_positions(*one.grid[1:], self.layout.pictures.merge_size)}
            for one in self.inputs([question]).media
        ]

    def _chosen(self, batch: Batch, most: int) -> Iterator[np.ndarray]:
        """Yield the most likely next token of each question [B], `most` times."""
        if (length := batch.tokens.shape[1] + most) > self.layout.context:
            seen = "data.max_pixels, data.max_frames or " if batch.media else ""
            raise UserError(
                f"{self.folder}: expected at most {self.layout.context} tokens of media, question and answer, found "
                f"{length}; shorten the question, or lower {seen}evaluate.max_new_tokens"
            )
        states, positions, mask = self._embedded(batch), batch.positions, batch.mask
        past = self._no_past(len(batch.tokens))
        for number in range(most):
            logits, past = self._step(states, positions, mask, past)
            chosen = logits.argmax(axis=1)
            yield chosen
            if number + 1 < most:
                states = self._embeddings.run({"tokens": chosen[:, None]})[0]
                positions = positions[..., -1:] + 1
                mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)

    def _step(
        self, states: np.ndarray, positions: np.ndarray, mask: np.ndarray, past: list[np.ndarray]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Run the decoder over `states` [B, S, H] after the keys and values `past`; return logits and the new ones."""
        given = {"embeddings": states, "positions": positions, "mask": mask}
        logits, *present = self._decoder.run(given | dict(zip(self._past, past, strict=True)))
        return logits, present

    def _no_past(self, rows: int) -> list[np.ndarray]:
        return [np.zeros((rows, self.layout.kv_heads, 0, self.layout.head_dim), np.float32)] * len(self._past)

    def _embedded(self, batch: Batch) -> np.ndarray:
        """Return the embeddings [B, S, H] of the tokens, with those of images and clips in their places."""
        states = self._embeddings.run({"tokens": batch.tokens})[0]
        if batch.media:
            features = self._features(batch)
            states[self._prompts.visual(batch.tokens)] = np.concatenate([features[index] for index in batch.shown])
        return states

    def _features(self, batch: Batch) -> list[np.ndarray]:
        """Return the visual tokens [n, H] of each of the batch's media; those of one size are computed together."""
        by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, one in enumerate(batch.media):
            by_size[one.grid[1:]].append(index)
        found: list[np.ndarray] = [np.empty(0)] * len(batch.media)
        for (height, width), indices in by_size.items():
            pixels = np.concatenate([batch.media[index].pixels for index in indices])
            positions = _patch_positions(height, width, self.layout.pictures.merge_size)
            fed = {"pixels": pixels, "positions": positions}
            steps = iter(self._vision.run(fed)[0])
            for index in indices:
                found[index] = np.concatenate([next(steps) for _ in range(batch.media[index].grid[0])])
        return found


# A device sees pictures of few sizes.
@lru_cache(maxsize=64)
def _patch_positions(height: int, width: int, merge: int) -> np.ndarray:
    """Return the row and column [height * width, 2] of each patch; those of a merged token follow each other."""
    places = np.indices((height, width)).reshape(2, height // merge, merge, width // merge, merge)
    return np.ascontiguousarray(places.transpose(1, 3, 2, 4, 0).reshape(-1, 2))
