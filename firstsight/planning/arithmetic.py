"""Arithmetic of each stage, in floating-point operations, from shapes and counts: for shares of the whole, not hours.

A forward pass takes 2 operations a weight and token (Kaplan et al., 2020, arXiv:2001.08361): the language model's
weights for each token of the sequence, the vision tower's for each patch (its projector, which sees a quarter of
them, included), the head's for each answer token. Attention's own S^2 and the embedding, a look-up, are left out.

Training takes three passes for what is trained, a backward pass being worth two; two for what is frozen beneath
adapters, through which gradients flow all the same; one for a frozen vision tower. Checkpointing adds one to all but
the last. What is not in the figures: answers come one token at a time and INT8 converts as it goes, so that both take
longer than their share.
"""

from firstsight.core.params import Optimisation, Params
from firstsight.planning.gpu_memory import Shape
from firstsight.planning.workload import Workload, patches_and_tokens


def finetuning(shape: Shape, settings: Optimisation, work: Workload) -> float:
    """Of finetune-teacher."""
    return settings.epochs * _epoch(shape, settings, work)


def caching(teacher: Shape, work: Workload) -> float:
    """Of cache-teacher-targets, which keeps hidden states or the best logits of train and validation split."""
    return (work.samples["train"] + work.samples["validation"]) * _sample(teacher, work, 1, 1)


def distilling(student: Shape, teacher: Shape, params: Params, work: Workload) -> float:
    """Of distill; online targets take a forward pass of the teacher in every epoch."""
    beside = caching(teacher, work) if params.targets.kind == "online" else 0
    return params.train.epochs * (_epoch(student, params.train, work) + beside)


def answering(shape: Shape, work: Workload, new_tokens: int) -> float:
    """Of evaluate, for one variant: each question of the test split alone, and `new_tokens` answer tokens."""
    alone = work.typical.alone()
    patches, tokens = patches_and_tokens(shape.model, alone)
    language = (tokens - alone.answer_tokens + new_tokens) * _body(shape) + new_tokens * shape.head
    return 2 * work.questions["test"] * (language + patches * shape.vision)


def _epoch(shape: Shape, settings: Optimisation, work: Workload) -> float:
    """Training on one split and validation on the other."""
    again = 1 if settings.gradient_checkpointing else 0
    language = (3 if settings.method == "full" else 2) + again
    vision = language if settings.train_vision else 1
    return work.samples["train"] * _sample(shape, work, language, vision) + work.samples["validation"] * _sample(
        shape, work, 1, 1
    )


def _sample(shape: Shape, work: Workload, language_passes: int, vision_passes: int) -> float:
    patches, tokens = patches_and_tokens(shape.model, work.typical)
    answers = work.typical.questions * work.typical.answer_tokens
    language = tokens * _body(shape) + answers * shape.head
    return 2 * (language_passes * language + vision_passes * patches * shape.vision)


def _body(shape: Shape) -> int:
    """Weights of the language model that each token meets: not the embedding, and not the head."""
    return shape.language - shape.embedding - (0 if shape.tied else shape.head)
