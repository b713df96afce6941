"""Compute the teacher's targets over classes: its score of each class for every record.

The score of a class is the log-probability of its wording. Softmax over the C scores at temperature T softens the
classes, where softmax over the vocabulary would give probability to words that are no class. No token is shared, so that
teacher and student may have different tokenizers.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from firstsight.caching.shards import write_shared
from firstsight.core.params import Targets
from firstsight.distillation.targets import STAGE, Shards, SplitTargetsWriter
from firstsight.packing.class_dataset import ClassDataset
from firstsight.packing.class_scores import class_scores
from firstsight.packing.pack import IGNORE


def write_class_targets(
    model: PreTrainedModel, dataset: ClassDataset, split: str, settings: Targets, folder: Path, workers: int
) -> dict[str, str]:
    """Write the shards of a split that are not in `folder` yet, which all processes share.

    Returns the teacher's answers to the records without one, by id: the class of the highest score.
    """
    classes = dataset.split.classes

    def compute(batches: Sequence[Sequence[int]]) -> Iterator[tuple[dict[str, Tensor], list[int], dict[str, float]]]:
        loader = DataLoader(dataset, batch_sampler=list(batches), collate_fn=dataset.collate, num_workers=workers)
        for numbers, batch in zip(batches, loader, strict=True):
            on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
            scores = class_scores(model, on_device, len(classes)).cpu()
            given = torch.tensor([answer for one in numbers for (answer,) in dataset.answers(one)])
            answers = torch.where(given == IGNORE, scores.argmax(-1), given)
            yield {"answers": answers, "hidden": scores}, [1] * len(answers), {}

    everything = range(len(dataset))
    batches = [everything[start : start + settings.batch_size] for start in everything[:: settings.batch_size]]
    write_shared(SplitTargetsWriter, folder, split, batches, compute, f"{STAGE}: {split}", "samples")
    shards = Shards(folder, split)
    records = (record for sample in dataset.split for record in sample.records)
    return {record.id: classes[shards.tokens(number)[0]] for number, record in enumerate(records) if not record.answer}
