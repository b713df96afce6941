"""Score classes by a model: the log-probability of each class's wording, its end token included, after the prompt."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from firstsight.packing.forward import answer_states
from firstsight.packing.output_head import head_weight
from firstsight.packing.pack import IGNORE

# Tokens whose logits are in memory at once: 156 MB in float32 at a vocabulary of 152,000 on the CPU, 311 MB on CUDA.
_CHUNK = {"cpu": 256, "cuda": 512}


def class_scores(model: nn.Module, batch: dict[str, Tensor], classes: int) -> Tensor:
    """Compute the scores [n, C] of C classes for the n records of a batch of a `ClassDataset`, in float32.

    A score is the sum of the log-probabilities of a wording's tokens. Samples without token labels have no scores.
    """
    labels = batch["token_labels"]
    hidden, tokens = answer_states(model, batch, labels)
    with torch.autocast(hidden.device.type, enabled=False):
        found = _log_probabilities(hidden, head_weight(model), tokens)
    if not len(found):
        return found.view(0, classes)
    segments = batch["segment_ids"]
    rows = torch.arange(len(segments), device=segments.device)[:, None] * (segments.max() + 1)
    branches = (rows + segments)[:, 1:][labels[:, 1:] != IGNORE]
    _, lengths = branches.unique_consecutive(return_counts=True)
    # Not index_add, which on CUDA adds in another order each time.
    return torch.segment_reduce(found, "sum", lengths=lengths).view(-1, classes)


def _log_probabilities(hidden: Tensor, head: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability [n] of each token given the hidden state [n, H] before it, at least in float32.

    Logits are computed chunk by chunk, and again in the backward pass, so that no [n, vocabulary] buffer is kept.
    """
    size = _CHUNK[hidden.device.type]
    starts = range(0, max(1, len(hidden)), size)
    parts = [(hidden[start : start + size], head, tokens[start : start + size]) for start in starts]
    if not torch.is_grad_enabled():
        return torch.cat([_of_chunk(*part) for part in parts])
    return torch.cat([checkpoint(_of_chunk, *part, use_reentrant=False) for part in parts])


def _of_chunk(hidden: Tensor, head: Tensor, tokens: Tensor) -> Tensor:
    precision = torch.promote_types(hidden.dtype, torch.float32)
    logits = linear(hidden.to(precision), head.to(precision))
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
