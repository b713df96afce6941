"""Compute a teacher's targets from its forward pass: for every answer token, or its scores of the classes.

The score of a class is the log-probability of its wording, normalised as `targets.class_scores` says. Softmax over the
C scores at temperature T softens the classes, where softmax over the vocabulary would give probability to words that
are no class. No token is compared, so that teacher and student may have different tokenizers.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from firstsight.caching.shards import write_shared
from firstsight.core.params import Targets
from firstsight.distillation.targets import STAGE, Shards, SplitTargetsWriter
from firstsight.loss.divergences import forward_kl
from firstsight.loss.products import CHUNK
from firstsight.loss.teachers import HiddenTeacher, TopKTeacher
from firstsight.loss.vocabulary import SharedVocabulary
from firstsight.packing.dataset import ClassDataset
from firstsight.packing.forward import answer_states, class_scores, normalisation
from firstsight.packing.output_head import head_weight
from firstsight.packing.pack import IGNORE
from firstsight.records.length import estimated_tokens, longest_first
from firstsight.records.parquet import AnsweredSplit, Split

# Temperatures at which the error of top-k is measured; it grows with T, as the tail gains probability.
TEMPERATURES = (1.0, 2.0, 4.0)
# Batches among which samples are ordered by length, so that they need little padding. They are written together, in the
# order of the split.
_WINDOW = 16


class TargetBuilder:
    """Compute a teacher's targets, batch by batch.

    Args:
        teacher: a model in eval mode; call `targets` under `torch.inference_mode`.
        settings: the kind of targets, and k for `topk`.
        vocabulary: the tokens that the teacher shares with the student.
    """

    def __init__(self, teacher: PreTrainedModel, settings: Targets, vocabulary: SharedVocabulary):
        self._teacher, self._kind = teacher, settings.kind
        self._head, self._shared = vocabulary.of_teacher(head_weight(teacher)), vocabulary.size
        self._k = min(settings.k, self._shared)

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes of the targets per answer token, without the 4 of the token itself."""
        if self._kind == "hidden":
            return HiddenTeacher.bytes_per_token(self._head.shape[1], self._teacher.dtype.itemsize)
        return TopKTeacher.bytes_per_token(self._k)

    @property
    def head(self) -> Tensor | None:
        """Return the teacher's head [V, H] if logits are computed from it, for `hidden` targets; else None."""
        return self._head if self._kind == "hidden" else None

    @property
    def head_bytes(self) -> int:
        """Return the bytes of `head`; 0 if it is None."""
        return self._head.nbytes if self._kind == "hidden" else 0

    def states(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Run the teacher over a packed batch; return the states [n, H] that predict each row's n answer tokens."""
        labels = batch["labels"]
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        hidden, _ = answer_states(self._teacher, inputs, labels)
        return list(hidden.split((labels[:, 1:] != IGNORE).sum(1).tolist()))

    def targets(self, hidden: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the targets of hidden states [n, H], by name, and the sums of errors by temperature (top-k only)."""
        return ({"hidden": hidden}, {}) if self._kind == "hidden" else self._top_k(hidden)

    def _top_k(self, hidden: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the fields of a `TopKTeacher` for hidden states [n, H], and its KL from the exact logits.

        The KL divergence is summed over the n tokens, by temperature.
        """
        exact, parts, errors = HiddenTeacher(hidden, self._head), [], dict.fromkeys(map(str, TEMPERATURES), 0.0)
        chunk = CHUNK[hidden.device.type]
        for start in range(0, len(hidden), chunk):
            logits = exact.logits(slice(start, start + chunk), self._shared, torch.float32)
            best = logits.topk(self._k)
            approximate = TopKTeacher(best.indices.to(torch.int32), best.values, logits.logsumexp(-1))
            rebuilt = approximate.logits(slice(0, chunk), self._shared, torch.float32)
            for temperature in TEMPERATURES:
                errors[str(temperature)] += forward_kl(logits, rebuilt, temperature).item()
            parts.append(approximate)
        names = ("ids", "best", "logsumexp")
        return {name: torch.cat([getattr(part, name) for part in parts]) for name in names}, errors


def write_class_targets(
    model: PreTrainedModel, dataset: ClassDataset, split: str, settings: Targets, folder: Path, workers: int
) -> dict[str, str]:
    """Write the shards of a split that are not in `folder` yet, which all processes share.

    Returns the teacher's answers to the records without one, by id: the class of the highest score.
    """
    classes = dataset.split.classes
    normalised = normalisation(settings.class_scores, model, dataset.processor, dataset.split)

    def compute(windows: Sequence[range]) -> Iterator[tuple[dict[str, Tensor], list[int], dict[str, float]]]:
        batches = [_batches(dataset.split, window, settings.batch_size) for window in windows]
        sampler = list(chain.from_iterable(batches))
        loader = iter(DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate, num_workers=workers))
        for window, own in zip(windows, batches, strict=True):
            by_sample = {}
            for numbers, batch in zip(own, islice(loader, len(own)), strict=True):
                on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
                found = normalised(class_scores(model, on_device, len(classes))).cpu()
                counts = [len(dataset.records(number)) for number in numbers]
                by_sample |= dict(zip(numbers, found.split(counts), strict=True))
            scores = torch.cat([by_sample[number] for number in window])
            given = torch.tensor([answer for number in window for (answer,) in dataset.answers(number)])
            answers = torch.where(given == IGNORE, scores.argmax(-1), given)
            yield {"answers": answers, "hidden": scores}, [1] * len(answers), {}

    size = _WINDOW * settings.batch_size
    windows = [range(start, min(start + size, len(dataset))) for start in range(0, len(dataset), size)]
    write_shared(SplitTargetsWriter, folder, split, windows, compute, f"{STAGE}: {split}", "samples")
    shards = Shards(folder, split)
    records = (record for sample in dataset.split for record in sample.records)
    return {record.id: classes[shards.tokens(number)[0]] for number, record in enumerate(records) if not record.answer}


def _batches(split: Split | AnsweredSplit, window: range, batch_size: int) -> list[list[int]]:
    """Return the numbers of a window's samples in batches of about the same length."""
    lengths = [estimated_tokens(sample, sample.records) for sample in map(split.__getitem__, window)]
    order = [window[number] for number in longest_first(lengths)]
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
