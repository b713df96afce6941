"""From a teacher's forward pass to its targets."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from firstsight.core.errors import UserError
from firstsight.core.params import Targets
from firstsight.data.packing import IGNORE
from firstsight.distillation.loss import CHUNK, HiddenTeacher, TopKTeacher, forward_kl
from firstsight.distillation.targets import SplitTargetsWriter
from firstsight.models.head import head_weight
from firstsight.models.packed import answer_states

# At which the error of top-k is measured: it grows with the temperature, as the tail gains weight.
TEMPERATURES = (1.0, 2.0, 4.0)


class Builder:
    """Computes a teacher's targets, batch by batch.

    Args:
        teacher: in eval mode; run under `torch.inference_mode`.
        settings: which kind of targets.
        shared: V, the tokens that the student also has.
    """

    def __init__(self, teacher: PreTrainedModel, settings: Targets, shared: int):
        self._teacher, self._kind = teacher, settings.kind
        self._k = min(settings.k, shared)
        self._head, self._shared = head_weight(teacher)[:shared], shared

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one answer token takes, besides the 4 of the token itself."""
        if self._kind == "hidden":
            return self._head.shape[1] * self._teacher.dtype.itemsize
        return self._k * (4 + 4) + 4

    @property
    def kept_head(self) -> Tensor | None:
        """The head [V, H] that goes with the targets: `hidden` needs it to make logits."""
        return self._head if self._kind == "hidden" else None

    @property
    def head_bytes(self) -> int:
        return self._head.nbytes if self._kind == "hidden" else 0

    def write(self, writer: SplitTargetsWriter, batch: dict[str, Tensor]) -> None:
        """Run the teacher over a packed batch and write its records, in order.

        Raises:
            UserError: a hidden state is not finite.
        """
        labels = batch.pop("labels")
        hidden, answers = answer_states(self._teacher, batch, labels)
        lengths = answer_lengths(batch["segment_ids"], labels)
        if not hidden.isfinite().all():
            bad = int((~hidden.isfinite()).any(-1).nonzero()[0])
            raise UserError(
                f"{self._teacher.name_or_path}: expected finite hidden states, found NaN or infinity at answer token "
                f"{bad} of batch {writer.batches}; load it with targets.precision: float32, or fine-tune it again"
            )
        tensors, errors = ({"hidden": hidden}, {}) if self._kind == "hidden" else self._best(hidden)
        writer.write({"answers": answers, **tensors}, lengths, errors)

    def _best(self, hidden: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The k best logits of hidden states [n, H], and the sums of the error that they make, by temperature."""
        exact, parts, errors = HiddenTeacher(hidden, self._head), [], dict.fromkeys(map(str, TEMPERATURES), 0.0)
        for start in range(0, len(hidden), CHUNK):
            logits = exact.logits(slice(start, start + CHUNK), self._shared, torch.float32)
            best = logits.topk(self._k)
            kept = TopKTeacher(best.indices.to(torch.int32), best.values, logits.logsumexp(-1))
            rebuilt = kept.logits(slice(0, CHUNK), self._shared, torch.float32)
            for temperature in TEMPERATURES:
                errors[str(temperature)] += forward_kl(logits, rebuilt, temperature).item()
            parts.append(kept)
        names = ("ids", "best", "logsumexp")
        return {name: torch.cat([getattr(part, name) for part in parts]) for name in names}, errors


def answer_lengths(segment_ids: Tensor, labels: Tensor) -> list[int]:
    """How many answer tokens each record of a packed batch [B, S] has, in order."""
    answered = labels[:, 1:] != IGNORE
    # A record is one segment of one row: numbered so that neighbours differ.
    rows = torch.arange(len(labels), device=labels.device)[:, None] * (segment_ids.max() + 1)
    owners = (rows + segment_ids[:, 1:])[answered]
    return torch.unique_consecutive(owners, return_counts=True)[1].tolist()
