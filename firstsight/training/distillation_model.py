"""A student with its loss, as one module."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel

from firstsight.core.params import Train
from firstsight.loss.distillation_loss import distillation_loss
from firstsight.loss.divergences import Divergence
from firstsight.loss.teachers import HiddenTeacher, Teacher, TopKTeacher
from firstsight.packing.forward import answer_states
from firstsight.packing.output_head import head_weight


class DistillationModel(nn.Module):
    """A student with its loss, so that DDP and FSDP see the whole forward pass.

    Args:
        student: the model to train.
        settings: temperature, alpha and divergence; None for supervised fine-tuning.
        teacher_head: [V, H_t] the teacher's output head over the V shared tokens, for teachers known by hidden states.
        teacher: the teacher itself, frozen and in eval mode, when it runs beside the student.
        shared_vocabulary: V, the tokens that both have.
        regularisation: what the method of training adds to the loss of a step, if anything.
    """

    accepts_loss_kwargs = True  # The Trainer then counts the answer tokens of the whole optimizer step.

    def __init__(
        self,
        student: PreTrainedModel,
        settings: Train | None = None,
        *,
        teacher_head: Tensor | None = None,
        teacher: PreTrainedModel | None = None,
        shared_vocabulary: int = 0,
        regularisation: Callable[[], Tensor | None] = lambda: None,
    ):
        super().__init__()
        self.student = student
        # The teacher is no part of this module: neither trained, nor saved, nor sent from process to process.
        self._teacher, self._teacher_head = (teacher,), None if teacher_head is None else teacher_head.detach()
        self.shared_vocabulary, self._regularisation = shared_vocabulary, regularisation
        self.temperature, self.alpha = (settings.temperature, settings.alpha) if settings else (1.0, 0.0)
        self.divergence = Divergence(settings.divergence, settings.jsd_beta) if settings else Divergence("forward_kl")

    def forward(
        self,
        labels: Tensor,
        teacher: dict[str, Tensor] | None = None,
        num_items_in_batch: Tensor | None = None,
        **batch: Tensor,
    ) -> dict[str, Tensor]:
        """Loss of a packed batch: labels [B, S] in their own places, and what is known of the teacher, by name.

        Returns `loss`, the sum over the batch divided by `num_items_in_batch`, and, for evaluation, sums over the
        batch, each [1]: divergence, ce, agreement, tokens.
        """
        hidden, answers = answer_states(self.student, batch, labels)
        loss = distillation_loss(
            hidden,
            head_weight(self.student),
            answers,
            self._known(teacher) if teacher else None,
            shared_vocabulary=self.shared_vocabulary,
            temperature=self.temperature,
            alpha=self.alpha,
            divergence=self.divergence,
        )
        sums = {"divergence": loss.divergence, "ce": loss.ce, "agreement": loss.agreement}
        sums["tokens"] = torch.full_like(loss.ce, len(answers))
        # No answer counts where a batch is nothing but the filling up of a last step; zero then, not 0 / 0.
        mean = loss.total / num_items_in_batch.clamp(min=1)
        if self.training and (penalty := self._regularisation()) is not None:
            # In shares that make one over the micro-batches of a step.
            mean = mean + penalty * len(answers) / num_items_in_batch.clamp(min=1)
        return {"loss": mean} | {name: value.detach()[None] for name, value in sums.items()}

    def _known(self, teacher: dict[str, Tensor]) -> Teacher:
        """The teacher at the batch's answer tokens: from its targets, or by running it over its own packed batch."""
        if "hidden" in teacher:
            return HiddenTeacher(teacher["hidden"], self._teacher_head)
        if "best" in teacher:
            return TopKTeacher(**teacher)
        labels = teacher["labels"]
        with torch.no_grad():
            hidden, _ = answer_states(self._teacher[0], {n: v for n, v in teacher.items() if n != "labels"}, labels)
        return HiddenTeacher(hidden, self._teacher_head)

    def metrics(self, evaluated: EvalPrediction) -> dict[str, float]:
        """Means over the answer tokens of a split, of the loss and of its parts."""
        divergence, ce, agreement, tokens = (float(np.sum(sums, dtype=np.float64)) for sums in evaluated.predictions)
        objective = self.alpha * self.temperature**2 * divergence + (1 - self.alpha) * ce
        parts = {"objective": objective / tokens, "ce": ce / tokens}
        if self.shared_vocabulary:  # there is a teacher to compare with
            parts |= {"divergence": divergence / tokens, "agreement": agreement / tokens}
        return parts
