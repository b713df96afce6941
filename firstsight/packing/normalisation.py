"""Normalise the scores of classes by a language model that is not fine-tuned, by length or by the prior of a wording.

A sum of log-probabilities is the lower, the longer and the rarer a wording is, whatever is asked. A model that is
trained on the sums learns to allow for it; one that is not, answers with short and frequent names.
"""

from collections.abc import Callable
from math import log
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from firstsight.core.errors import UserError
from firstsight.core.params import ClassScores
from firstsight.packing.dataset import class_batch
from firstsight.packing.forward import class_scores
from firstsight.packing.positions import check_positions, classes_tokens, wording_tokens
from firstsight.records.parquet import Split
from firstsight.records.sample import Record, Sample

Normalisation = Callable[[Tensor], Tensor]


def normalisation(kind: ClassScores, model: PreTrainedModel, processor: Any, split: Split) -> Normalisation:
    """Return the function that normalises scores [n, C] of the split's C classes, which are sums over tokens.

    sum: the scores as they are. mean: the score of a class over the number of its tokens, end token included.
    calibrated: the score minus the log of the class's probability behind a question without content (contextual
    calibration, Zhao et al., 2021, arXiv:2102.09690; its log is the domain-conditional PMI of Holtzman et al., 2021,
    arXiv:2104.08315). That probability is among the classes, and the mean over the split's content-free questions.

    Raises:
        UserError: the split has no content-free questions to calibrate by, or the model no positions for one.
    """
    if kind == "mean":
        tokens = torch.tensor(wording_tokens(processor, split.classes), device=model.device)
        return lambda scores: scores / tokens
    if kind == "calibrated":
        prior = _log_prior(model, processor, split)
        return lambda scores: scores - prior
    return lambda scores: scores


@torch.inference_mode()
def _log_prior(model: PreTrainedModel, processor: Any, split: Split) -> Tensor:
    """Return the log of the mean probability [C] of each class behind the split's content-free questions."""
    if not split.content_free:
        raise UserError(
            f"{split.path}: expected questions without content, by which targets.class_scores calibrates, found none; "
            "run build-egoqa-dataset again with data.prompt"
        )
    found = []
    for number, question in enumerate(split.content_free):
        record = Record(f"content-free-{number}", question, "", (), "open")
        sample = Sample(record.id, record.id, "", "none", (), 0, (record,))
        check_positions(processor, sample, classes_tokens(processor, split.classes))
        batch = class_batch(processor, [(sample, record)], split.classes)
        on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
        found.append(class_scores(model, on_device, len(split.classes)).log_softmax(-1))
    return torch.cat(found).logsumexp(0) - log(len(found))
