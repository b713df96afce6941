"""The student with its loss as one module, which the Trainer trains."""

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel

from firstsight.core.params import Train
from firstsight.loss.distillation_loss import distillation_loss
from firstsight.loss.divergences import Divergence
from firstsight.loss.teachers import HiddenTeacher, Teacher, TopKTeacher
from firstsight.loss.vocabulary import SharedVocabulary
from firstsight.packing.forward import answer_states, class_scores
from firstsight.packing.output_head import head_weight
from firstsight.packing.pack import IGNORE


class DistillationModel(nn.Module):
    """Compute the student's loss in one forward pass, so that DDP and FSDP wrap all of it.

    The objective is that of `firstsight.loss.distillation_loss`.

    Args:
        student: the model to train.
        settings: temperature, alpha and divergence; None for supervised fine-tuning (alpha 0).
        teacher_head: [V, H_t] the teacher's output head over the shared vocabulary; None for `topk` targets.
        teacher: for online targets, the teacher itself, frozen and in eval mode.
        vocabulary: the V tokens that teacher and student share; None without a teacher.
        classes: C, if the loss is over classes: the student's scores [N, C] of the N records (`class_scores`) are then
            its hidden states, with an identity as head, and classes are the answer tokens; None for tokens.
        regularisation: returns the penalty of the fine-tuning method on a step, or None.
    """

    accepts_loss_kwargs = True  # The Trainer then counts the answer tokens of the whole optimizer step.

    def __init__(
        self,
        student: PreTrainedModel,
        settings: Train | None = None,
        *,
        teacher_head: Tensor | None = None,
        teacher: PreTrainedModel | None = None,
        vocabulary: SharedVocabulary | None = None,
        classes: int | None = None,
        regularisation: Callable[[], Tensor | None] = lambda: None,
    ):
        super().__init__()
        self.student = student
        # In a tuple, so that the teacher is not a submodule: it is not trained, saved or broadcast.
        self._teacher, self._teacher_head = (teacher,), None if teacher_head is None else teacher_head.detach()
        self.vocabulary, self._classes, self._regularisation = vocabulary, classes, regularisation
        self.temperature, self.alpha = (settings.temperature, settings.alpha) if settings else (1.0, 0.0)
        self.divergence = Divergence(settings.divergence, settings.jsd_beta) if settings else Divergence("forward_kl")

    def forward(
        self,
        labels: Tensor,
        teacher: dict[str, Tensor] | None = None,
        num_items_in_batch: Tensor | None = None,
        **batch: Tensor,
    ) -> dict[str, Tensor]:
        """Compute the loss of a packed batch.

        Args:
            labels: [B, S], not shifted; or the classes of the records.
            teacher: the teacher's features of the batch (`TeacherSource`), by name.
            num_items_in_batch: number of answer tokens of the optimizer step, in all processes.
            batch: the other tensors of the packed batch.

        Returns `loss`, the sum over the batch divided by `num_items_in_batch`, and, for evaluation, sums over the
        batch, each [1]: divergence, ce, agreement, tokens. For a loss over classes, tokens are records, and the last
        sum is `right`, the number of records whose best class is their own.
        """
        if self._classes is None:
            hidden, answers = answer_states(self.student, batch, labels)
            head = head_weight(self.student)
        else:
            hidden, answers = class_scores(self.student, batch, self._classes), labels[labels != IGNORE]
            head = torch.eye(self._classes, dtype=hidden.dtype, device=hidden.device)
        # Scores are exact to float32, and autocast would allow that the loss rounds them to TF32.
        exact = torch.autocast(hidden.device.type, enabled=False) if self._classes is not None else nullcontext()
        with exact:
            loss = distillation_loss(
                hidden,
                head,
                answers,
                self._loss_teacher(teacher) if teacher else None,
                shared_vocabulary=self.vocabulary.size if self.vocabulary else 0,
                temperature=self.temperature,
                alpha=self.alpha,
                divergence=self.divergence,
                exchanged=self.vocabulary and self.vocabulary.exchanged,
            )
        sums = {"divergence": loss.divergence, "ce": loss.ce, "agreement": loss.agreement}
        sums["tokens"] = torch.full_like(loss.ce, len(answers))
        if self._classes is not None:
            sums["right"] = (hidden.argmax(-1) == answers).sum()
        # A step of padding samples alone has no answer tokens: its loss is 0, not 0 / 0.
        mean = loss.total / num_items_in_batch.clamp(min=1)
        if self.training and (penalty := self._regularisation()) is not None:
            # Weighted so that the micro-batches of a step add up to one penalty.
            mean = mean + penalty * len(answers) / num_items_in_batch.clamp(min=1)
        return {"loss": mean} | {name: value.detach()[None] for name, value in sums.items()}

    def _loss_teacher(self, teacher: dict[str, Tensor]) -> Teacher:
        """Return the teacher at the batch's answer tokens, from its targets or by running it on its packed batch."""
        if "hidden" in teacher:
            return HiddenTeacher(teacher["hidden"], self._teacher_head)
        if "best" in teacher:
            return TopKTeacher(**teacher)
        labels = teacher["labels"]
        with torch.no_grad():
            hidden, _ = answer_states(self._teacher[0], {n: v for n, v in teacher.items() if n != "labels"}, labels)
        return HiddenTeacher(hidden, self._teacher_head)

    def metrics(self, evaluated: EvalPrediction) -> dict[str, float]:
        """Return the objective and its parts, and the accuracy of classes, as means over a split's answer tokens."""
        sums = [float(np.sum(one, dtype=np.float64)) for one in evaluated.predictions]
        divergence, ce, agreement, tokens, *right = sums
        objective = self.alpha * self.temperature**2 * divergence + (1 - self.alpha) * ce
        parts = {"objective": objective / tokens, "ce": ce / tokens}
        if self.vocabulary is not None:  # with a teacher
            parts |= {"divergence": divergence / tokens, "agreement": agreement / tokens}
        if right:  # over classes
            parts["accuracy"] = right[0] / tokens
        return parts
