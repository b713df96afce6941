"""Run a model over packed samples (`firstsight.packing.pack`), as if each record were asked alone; score classes."""

from collections.abc import Callable
from math import log
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel

from firstsight.core.errors import UserError
from firstsight.core.params import ClassScores
from firstsight.models.egogpt import EgoGptModel
from firstsight.models.text_attention import takes_masks_of_the_last_tokens
from firstsight.packing.dataset import class_batch
from firstsight.packing.output_head import head_weight
from firstsight.packing.pack import IGNORE
from firstsight.packing.positions import wording_tokens
from firstsight.packing.vision_tower import placeholders
from firstsight.records.parquet import Split

# Keys of a packed batch that the model itself does not take.
PACKING_KEYS = ("segment_ids", "branch_offsets", "labels", "token_labels", "visual_tokens")
# What turns scores [n, C] of classes into others.
Normalisation = Callable[[Tensor], Tensor]
# Tokens whose logits are in memory at once: 156 MB in float32 at a vocabulary of 152,000 on the CPU, 311 MB on CUDA.
_CHUNK = {"cpu": 256, "cuda": 512}
# The tokens that need no mask are rounded down to a multiple of this, so that few shapes are recorded as CUDA graphs.
_TILE = 256


def attention_mask(model: nn.Module, segment_ids: Tensor) -> Tensor:
    """Return the additive mask [B, 1, R, S] of segment ids [B, S]: 0 where allowed, the dtype's minimum elsewhere.

    A token attends to itself and to earlier tokens of the prefix (segment 0) and of its own segment. Padding (-1)
    attends to padding, so that no row is empty (an empty softmax is NaN), and nothing attends to it. The mask is that
    of the last R tokens: of all, or in a long sequence of those from the second record on, where the model lets the
    tokens before attend to all earlier ones (`firstsight.models.text_attention`).
    """
    causal = _causal_tokens(segment_ids) if takes_masks_of_the_last_tokens(model) else 0
    return branch_mask(segment_ids[:, causal:], segment_ids, model.dtype)


def _causal_tokens(segment_ids: Tensor) -> int:
    """Return how many tokens at the start of [B, S] may attend to all earlier ones: all, or a multiple of `_TILE`.

    Those come before the first place at which any row has a token of its second record.
    """
    length = segment_ids.shape[1]
    if length < _TILE:  # a mask of few tokens costs nothing, and asking makes the CPU wait for the GPU
        return 0
    later = (segment_ids > 1).any(0)
    causal = int((later.cumsum(0) == 0).sum())
    return causal if causal == length else causal - causal % _TILE


def branch_mask(queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive mask [B, 1, Q, S] of the last Q tokens of S, from the segment ids of both, as above.

    Args:
        queries: [B, Q] segment ids of the tokens that attend, Q from 0 to S.
        keys: [B, S] segment ids of all tokens, which end with those of `queries`.
    """
    query, key = queries[:, :, None], keys[:, None, :]
    earlier = keys.shape[1] - queries.shape[1]
    causal = torch.ones(queries.shape[1], keys.shape[1], dtype=torch.bool, device=keys.device).tril(earlier)
    allowed = causal & ((query == key) | ((key == 0) & (query > 0)))
    mask = torch.zeros(allowed.shape, dtype=dtype, device=keys.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def position_ids(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the positions of records asked alone: [3, B, S] for multimodal rotary models, else [B, S].

    The model numbers the packed sequence as any other; each branch is then moved back by its offset. That is exact
    because branches hold text alone, whose positions grow by one per token in every dimension.
    """
    base = model.base_model
    if hasattr(base, "get_rope_index"):
        # All inputs, as generate() passes them: which ones positions depend on differs by architecture, and one that is
        # missing has a silent default (Qwen2.5-VL's second_per_grid_ts).
        positions, _ = base.get_rope_index(**_inputs(batch), attention_mask=(batch["segment_ids"] >= 0).long())
    else:
        places = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
        # Padding at position 0, because a model with learned positions has none for all places of a packed sequence.
        positions = torch.where(batch["segment_ids"] >= 0, places, batch["branch_offsets"])
    return positions - batch["branch_offsets"]


def last_hidden_states(model: nn.Module, batch: dict[str, Any], cache: Cache | None = None) -> Tensor:
    """Compute the final hidden states [B, S, H] (after the last norm) of a packed batch, without logits.

    Where the batch has `visual_tokens` [n, H], those of all its images and videos in their order, the vision tower does
    not run. Keys and values are put into `cache`, if there is one, for tokens that follow.
    """
    seen = "visual_tokens" in batch
    outputs = model.base_model(
        **({"inputs_embeds": _embeddings(model, batch)} if seen else _inputs(batch)),
        position_ids=position_ids(model, batch),
        past_key_values=cache,
        use_cache=cache is not None,
        attention_mask=attention_mask(model, batch["segment_ids"]),
    )
    return outputs.last_hidden_state


def _embeddings(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the embeddings [B, S, H] of a packed batch, with its visual tokens at their placeholders."""
    ids, base = batch["input_ids"], model.model
    embeddings = base.embed_with_silence(ids) if isinstance(base, EgoGptModel) else model.get_input_embeddings()(ids)
    return embeddings.masked_scatter(placeholders(model.config, ids)[..., None], batch["visual_tokens"].to(embeddings))


def _inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """Return what the model itself takes of a packed batch."""
    return {name: value for name, value in batch.items() if name not in PACKING_KEYS}


def answer_states(model: nn.Module, batch: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the hidden states [n, H] that predict the n answer tokens of a packed batch; return both.

    `labels` [B, S] are those of `pack`; the answer tokens come as [n], in the order of the batch.
    """
    # The state before a token predicts it.
    following = labels[:, 1:]
    # Found before the model runs: on a GPU, the CPU waits for their number, and would wait for the model.
    rows, places = (following != IGNORE).nonzero(as_tuple=True)
    return last_hidden_states(model, batch)[rows, places], following[rows, places]


def class_scores(model: nn.Module, batch: dict[str, Tensor], classes: int) -> Tensor:
    """Compute the scores [n, C] of C classes for the n records of a batch of a `ClassDataset`, in float32.

    A score is the sum of the log-probabilities of a wording's tokens; of an encoder, whose batch is that of an
    `EncoderDataset`, the logit of the class. Samples without token labels, or that are not `scored`, have no scores.
    """
    if "scored" in batch:
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return found.logits.float()[batch["scored"]]
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


def normalisation(kind: ClassScores, model: PreTrainedModel, processor: Any, split: Split) -> Normalisation:
    """Return the function that normalises a language model's scores [n, C] of the split's C classes.

    sum: the scores as they are. mean: the score of a class over the number of its tokens, end token included.
    calibrated: the score minus the log of the class's probability behind a question without content (contextual
    calibration, Zhao et al., 2021, arXiv:2102.09690; its log is the domain-conditional PMI of Holtzman et al., 2021,
    arXiv:2104.08315). That probability is among the classes, and the mean over the split's content-free questions.

    Raises:
        UserError: the split has no content-free questions to calibrate by.
    """
    if kind == "mean":
        tokens = torch.tensor(wording_tokens(processor, split.classes), device=model.device)
        return lambda scores: scores / tokens
    if kind == "calibrated":
        prior = _log_prior(model, processor, split)
        return lambda scores: scores - prior
    return as_sums


def as_sums(scores: Tensor) -> Tensor:
    """Return the scores [n, C] of classes as they are, each the log-probability of its name, or an encoder's logit."""
    return scores


@torch.inference_mode()
def _log_prior(model: PreTrainedModel, processor: Any, split: Split) -> Tensor:
    """Return the log of the mean probability [C] of each class behind the split's content-free questions."""
    if not split.content_free:
        raise UserError(
            f"{split.path}: expected questions without content, by which targets.class_scores calibrates, found none; "
            "run build-egoqa-dataset again with data.prompt"
        )
    found = []
    for sample in split.content_free:
        batch = class_batch(processor, [(sample, sample.records[0])], split.classes)
        on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
        found.append(class_scores(model, on_device, len(split.classes)).log_softmax(-1))
    return torch.cat(found).logsumexp(0) - log(len(found))


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
