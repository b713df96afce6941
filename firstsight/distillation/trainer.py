"""Training with the distillation loss on Hugging Face's Trainer: of a student from a teacher's targets, and, without
targets and with alpha 0, supervised fine-tuning."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, EvalPrediction, PreTrainedModel, Trainer, TrainingArguments

from firstsight.core.params import Optimisation
from firstsight.data.dataset import PackedDataset
from firstsight.data.packing import IGNORE
from firstsight.distillation.loss import Teacher, distillation_loss
from firstsight.models.packed import last_hidden_states


class DistillationModel(nn.Module):
    """A student with its loss, as one module, so that DDP and FSDP see the whole forward pass.

    `teacher_head` [V, H] is the teacher's output head over the V shared tokens; without it the loss is CE alone.
    """

    accepts_loss_kwargs = True  # The Trainer then counts the answer tokens of the whole optimizer step.

    def __init__(self, student: PreTrainedModel, teacher_head: Tensor | None, temperature: float, alpha: float):
        super().__init__()
        self.student = student
        self.register_buffer("teacher_head", teacher_head, persistent=False)
        self.temperature, self.alpha = temperature, alpha

    def forward(
        self,
        labels: Tensor,
        teacher_hidden: Tensor | None = None,
        num_items_in_batch: Tensor | None = None,
        **batch: Tensor,
    ) -> dict[str, Tensor]:
        """Loss of a packed batch: labels [B, S] in their own places, teacher_hidden [n, H] at the n answer tokens.

        Returns `loss`, the sum over the batch divided by `num_items_in_batch`, and, for evaluation, sums over the
        batch, each [1]: kl, ce, agreement, tokens.
        """
        # The state before a token predicts it.
        following = labels[:, 1:]
        answered = following != IGNORE
        hidden = last_hidden_states(self.student, batch)[:, :-1][answered]
        teacher = Teacher(teacher_hidden, self.teacher_head) if teacher_hidden is not None else None
        loss = distillation_loss(
            hidden,
            self.student.get_output_embeddings().weight,
            following[answered],
            teacher,
            shared_vocabulary=len(self.teacher_head) if teacher else 0,
            temperature=self.temperature,
            alpha=self.alpha,
        )
        sums = {"kl": loss.kl, "ce": loss.ce, "agreement": loss.agreement, "tokens": answered.sum().to(loss.ce.dtype)}
        return {"loss": loss.total / num_items_in_batch} | {name: value.detach()[None] for name, value in sums.items()}

    def metrics(self, evaluated: EvalPrediction) -> dict[str, float]:
        """Means over the answer tokens of a split, of the loss and of its parts."""
        kl, ce, agreement, tokens = (float(np.sum(sums, dtype=np.float64)) for sums in evaluated.predictions)
        objective = self.alpha * self.temperature**2 * kl + (1 - self.alpha) * ce
        return {"objective": objective / tokens, "kl": kl / tokens, "ce": ce / tokens, "agreement": agreement / tokens}


class DistillationTrainer(Trainer):
    """HF Trainer over a `DistillationModel`, whose checkpoints are those of the student alone."""

    model: DistillationModel

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        prefix = "student."
        weights = {
            name.removeprefix(prefix): value
            for name, value in (state_dict or self.model.state_dict()).items()
            if name.startswith(prefix)
        }
        self.model.student.save_pretrained(output_dir or self.args.output_dir, state_dict=weights)

    def _load_best_model(self) -> None:
        # Through from_pretrained, because folders keep the hub's names of weights, which are not the modules'.
        student = self.model.student
        best = type(student).from_pretrained(self.state.best_model_checkpoint, dtype=student.dtype)
        student.load_state_dict(best.state_dict())


def train(
    model: DistillationModel,
    train_set: PackedDataset,
    validation_set: PackedDataset,
    optimisation: Optimisation,
    scratch: Path,
    *,
    early_stopping_epochs: int | None = None,
    data_workers: int = 0,
    device: str,
) -> list[dict[str, float]]:
    """Train `model.student` in place and leave it with the weights of the best validation epoch.

    The effective batch, `batch_size x gradient_accumulation_steps`, is kept whatever the number of processes.
    Returns the history: one row a logged step, with training and validation figures, and no timings, so that equal
    runs have equal histories.
    """
    arguments = TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=optimisation.epochs,
        per_device_train_batch_size=optimisation.batch_size,
        per_device_eval_batch_size=optimisation.batch_size,
        gradient_accumulation_steps=optimisation.gradient_accumulation_steps,
        learning_rate=optimisation.learning_rate,
        warmup_steps=optimisation.warmup_fraction,
        weight_decay=optimisation.weight_decay,
        max_grad_norm=optimisation.max_grad_norm,
        lr_scheduler_type="cosine",
        seed=optimisation.seed,
        use_cpu=device == "cpu",
        bf16=device == "cuda",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="objective",
        greater_is_better=False,
        logging_steps=10,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_num_workers=data_workers,
        report_to="none",
    )
    callbacks = [EarlyStoppingCallback(early_stopping_epochs)] if early_stopping_epochs else []
    trainer = DistillationTrainer(
        model=model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=validation_set,
        data_collator=train_set.collate,
        compute_metrics=model.metrics,
        callbacks=callbacks,
    )
    trainer.train()
    return [
        {name: value for name, value in row.items() if not name.endswith(("_runtime", "_per_second", "_flos"))}
        for row in trainer.state.log_history
    ]
