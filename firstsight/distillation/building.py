"""From a teacher's forward pass to its targets."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from firstsight.core.params import Targets
from firstsight.data.packing import IGNORE
from firstsight.distillation.loss import CHUNK, HiddenTeacher, TopKTeacher, forward_kl
from firstsight.distillation.targets import SplitTargetsWriter
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
        self._head, self._shared = teacher.get_output_embeddings().weight[:shared], shared
        self._error_sums, self._tokens = dict.fromkeys(TEMPERATURES, 0.0), 0

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
        """Run the teacher over a packed batch and write its records, in order."""
        labels = batch.pop("labels")
        hidden, answers = answer_states(self._teacher, batch, labels)
        tensors = {"hidden": hidden} if self._kind == "hidden" else self._best(hidden)
        for rows in record_rows(batch["segment_ids"], labels):
            writer.write({name: tensor[rows] for name, tensor in tensors.items()}, answers[rows])

    def _best(self, hidden: Tensor) -> dict[str, Tensor]:
        """The k best logits of hidden states [n, H], in chunks; adds to the error they make."""
        exact, parts = HiddenTeacher(hidden, self._head), []
        for start in range(0, len(hidden), CHUNK):
            logits = exact.logits(slice(start, start + CHUNK), self._shared, torch.float32)
            best = logits.topk(self._k)
            kept = TopKTeacher(best.indices.to(torch.int32), best.values, logits.logsumexp(-1))
            rebuilt = kept.logits(slice(0, CHUNK), self._shared, torch.float32)
            for temperature in TEMPERATURES:
                self._error_sums[temperature] += forward_kl(logits, rebuilt, temperature).item()
            parts.append(kept)
        self._tokens += len(hidden)
        return {name: torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "best", "logsumexp")}

    def topk_error(self) -> dict[str, float]:
        """Mean KL a token of the exact teacher from its k best, by temperature; empty for exact targets."""
        if self._kind != "topk":
            return {}
        return {str(temperature): total / self._tokens for temperature, total in self._error_sums.items()}


def record_rows(segment_ids: Tensor, labels: Tensor) -> list[slice]:
    """Where each record's answer tokens lie among those of a packed batch [B, S], in order."""
    following = labels[:, 1:] != IGNORE
    # A record is one segment of one row: numbered so that neighbours differ.
    rows = torch.arange(len(labels), device=labels.device)[:, None] * (segment_ids.max() + 1)
    owners = (rows + segment_ids[:, 1:])[following]
    ends = torch.unique_consecutive(owners, return_counts=True)[1].cumsum(0).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
