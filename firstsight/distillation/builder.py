"""Compute a teacher's targets from its forward pass."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from firstsight.core.params import Targets
from firstsight.loss.divergences import forward_kl
from firstsight.loss.products import CHUNK
from firstsight.loss.teachers import HiddenTeacher, TopKTeacher
from firstsight.loss.vocabulary import SharedVocabulary
from firstsight.packing.forward import answer_states
from firstsight.packing.output_head import head_weight
from firstsight.packing.pack import IGNORE

# Temperatures at which the error of top-k is measured; it grows with T, as the tail gains probability.
TEMPERATURES = (1.0, 2.0, 4.0)


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
