"""Estimate the floating-point operations of each stage from shapes and counts, for shares of the whole, not hours.

A forward pass takes 2 operations per weight and token (Kaplan et al., 2020, arXiv:2001.08361): the language model's
weights for each token of the sequence, the vision tower's for each patch (including its projector, which sees a quarter
of them), the head's for each answer token. Attention's S^2 products and the embedding look-up are not counted.

Training costs three forward passes for trained weights, since a backward pass is worth two; two for weights frozen
beneath adapters, through which gradients flow; one for a frozen vision tower, none where its outputs are cached.
Gradient checkpointing adds one to all but the last two. Not modelled: answers are generated one token at a time and
INT8 converts on the fly, so that both take longer than their share.
"""

import math
from collections.abc import Sequence

from firstsight.core.params import Evaluate, Export, Optimisation, Params
from firstsight.models.rounding import MOST_BYTES
from firstsight.planning.model_shape import Shape
from firstsight.planning.workload import Workload, patches_and_tokens

# Questions on which an export is compared with its original, and repeats of a measurement: as in export/folder.py and
# profiling/cost.py, whose libraries plans do not need.
COMPARED, REPEATS = 32, 5


def finetuning(shape: Shape, settings: Optimisation, work: Workload) -> float:
    """Return the operations of finetune-teacher."""
    return settings.epochs * _epoch(shape, settings, work)


def caching(teacher: Shape, work: Workload) -> float:
    """Return the operations of cache-teacher-targets: a forward pass over the train and validation splits."""
    return (work.samples["train"] + work.samples["validation"]) * _sample(teacher, work, 1, 1)


def looking(student: Shape, work: Workload) -> float:
    """Return the operations of cache-visual-tokens: the vision tower once over the train and validation splits."""
    return (work.samples["train"] + work.samples["validation"]) * _sample(student, work, 0, 1)


def distilling(student: Shape, teacher: Shape, params: Params, work: Workload) -> float:
    """Return the operations of distill; online targets take a forward pass of the teacher in every epoch."""
    online = caching(teacher, work) if params.targets.kind == "online" else 0
    return params.train.epochs * (_epoch(student, params.train, work) + online)


def answering(shape: Shape, work: Workload, new_tokens: int) -> float:
    """Return the operations of evaluate for one variant: each test question alone, with `new_tokens` answer tokens."""
    return work.questions["test"] * (sum(_reading(shape, work)) + 2 * new_tokens * (_body(shape) + shape.head))


def measuring(shape: Shape, work: Workload, settings: Evaluate) -> float:
    """Return the operations of evaluate's measurements of one variant's speed, without those of answers."""
    rounds = 1 + REPEATS
    prompts = 2 * rounds * settings.latency_runs + rounds * sum(settings.throughput_batch_sizes)
    return prompts * sum(_reading(shape, work))


def exporting(shape: Shape, work: Workload, settings: Export, formats: Sequence[str]) -> float:
    """Return the operations of an export's stage: questions that model and exports answer, and what rounds weights.

    To round weights to 4 bits, each graph reads all calibration samples again for each of the parts into which its
    moments fall, K x K float32 numbers of visual and of text tokens for each input of K numbers.
    """
    language, vision = _reading(shape, work)
    compared = 2 * min(COMPARED, work.samples["validation"]) * (1 + len(formats)) * (language + vision)
    if "onnx-w4a8" not in formats:
        return compared
    parts = _parts(shape.layers, shape.hidden, shape.intermediate) * language
    parts += _parts(shape.vision_layers, shape.vision_hidden, shape.vision_intermediate) * vision
    return compared + settings.calibration_samples * (language + vision + parts)


def _parts(layers: int, hidden: int, intermediate: int) -> int:
    """Return in how many parts the moments of a transformer's matrices are held; three inputs of a layer are hidden."""
    return math.ceil(8 * layers * (3 * hidden**2 + intermediate**2) / MOST_BYTES)


def _reading(shape: Shape, work: Workload) -> tuple[float, float]:
    """Return the operations of reading a question alone: of the language model, and of the vision tower."""
    alone = work.typical.alone()
    patches, tokens = patches_and_tokens(shape.model, alone)
    return 2 * (tokens - alone.answer_tokens) * _body(shape), 2 * patches * shape.vision


def _epoch(shape: Shape, settings: Optimisation, work: Workload) -> float:
    """Return the operations of one epoch: training on the train split and validation."""
    recomputed = 1 if settings.gradient_checkpointing else 0
    language = (3 if settings.method == "full" else 2) + recomputed
    forward = 0 if settings.caches_visual_tokens else 1
    vision = language if settings.train_vision else forward
    return work.samples["train"] * _sample(shape, work, language, vision) + work.samples["validation"] * _sample(
        shape, work, 1, forward
    )


def _sample(shape: Shape, work: Workload, language_passes: int, vision_passes: int) -> float:
    """Return the operations of the given numbers of forward passes of language model and vision tower over a sample."""
    patches, tokens = patches_and_tokens(shape.model, work.typical)
    answers = work.typical.questions * work.typical.answer_tokens
    language = tokens * _body(shape) + answers * shape.head
    return 2 * (language_passes * language + vision_passes * patches * shape.vision)


def _body(shape: Shape) -> int:
    """Return the number of weights applied to each token: the language model without embedding and head."""
    return shape.language - shape.embedding - (0 if shape.tied else shape.head)
