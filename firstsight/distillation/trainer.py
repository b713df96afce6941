"""Training with the distillation loss on Hugging Face's Trainer: of a student from what is known of its teacher, and,
without a teacher and with alpha 0, supervised fine-tuning."""

import json
import math
import signal
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, EvalPrediction, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback, TrainerCallback

from firstsight.core.errors import Unfinished, UserError
from firstsight.core.params import Optimisation, Train
from firstsight.core.stage import log
from firstsight.data.dataset import PackedDataset
from firstsight.distillation.loss import Divergence, HiddenTeacher, Teacher, TopKTeacher, distillation_loss
from firstsight.models.head import head_weight
from firstsight.models.packed import answer_states


class DistillationModel(nn.Module):
    """A student with its loss, as one module, so that DDP and FSDP see the whole forward pass.

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


_CHECKPOINT = "trained.safetensors"
# Optimizer steps from one logged loss to the next. Checkpoints are made at such steps and where epochs end, so that a
# run that goes on after one logs what it would have logged without it.
_LOGGING_STEPS = 10
_MINUTES_BETWEEN_CHECKPOINTS = 10


class DistillationTrainer(Trainer):
    """HF Trainer over a `DistillationModel`, whose checkpoints hold what is trained of the student, and that alone."""

    model: DistillationModel

    def _get_train_sampler(self, train_dataset: PackedDataset | None = None) -> Sampler:
        return EpochShuffle(train_dataset or self.train_dataset, self.args.seed)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder, values = Path(output_dir or self.args.output_dir), state_dict or self.model.state_dict()
        folder.mkdir(parents=True, exist_ok=True)
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        save_file({name: values[name].contiguous() for name in trained}, folder / _CHECKPOINT)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        (model or self.model).load_state_dict(load_file(Path(resume_from_checkpoint) / _CHECKPOINT), strict=False)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class EpochShuffle(Sampler[int]):
    """A dataset's samples in an order that seed and epoch alone decide, and what fills the last step up after them.

    However many processes share an epoch, its steps then take the same samples.
    """

    def __init__(self, dataset: PackedDataset, seed: int):
        self._samples, self._length, self._seed, self._epoch = len(dataset.split), len(dataset), seed, 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        yield from torch.randperm(self._samples, generator=generator).tolist()
        yield from range(self._samples, self._length)

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer as an epoch begins."""
        self._epoch = epoch


def micro_batches(optimisation: Optimisation, processes: int) -> tuple[int, int]:
    """Samples of a process's micro-batch, and how many micro-batches it takes to a step.

    A step takes `batch_size x gradient_accumulation_steps` samples whatever the number of processes.

    Raises:
        UserError: that many samples cannot be shared out evenly.
    """
    step = optimisation.batch_size * optimisation.gradient_accumulation_steps
    if step % processes:
        raise UserError(
            f"params.yaml: expected batch_size x gradient_accumulation_steps to be a multiple of the {processes} "
            f"processes, found {optimisation.batch_size} x {optimisation.gradient_accumulation_steps}; change one"
        )
    share = step // processes
    micro = max(size for size in range(1, optimisation.batch_size + 1) if share % size == 0)
    return micro, share // micro


def total_steps(samples: int, optimisation: Optimisation) -> int:
    """Optimizer steps that training on a split of so many samples takes, unless it stops early."""
    step = optimisation.batch_size * optimisation.gradient_accumulation_steps
    return math.ceil(optimisation.epochs * math.ceil(samples / step))


class AfterStep(TrainerCallback):
    """Calls a function with the step's number after each optimizer step, while the gradients are still there."""

    def __init__(self, function: Callable[[int], None]):
        self._function = function

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._function(state.global_step)


class Checkpoints(TrainerCallback):
    """Asks for a checkpoint every so often within an epoch, and for a last one when the process is told to end.

    The main process decides for all, because they write a checkpoint together.
    """

    def __init__(self, seconds: float = 60 * _MINUTES_BETWEEN_CHECKPOINTS):
        self._seconds, self._last, self.told = seconds, time.monotonic(), False

    def tell(self, *_signal: object) -> None:
        """A signal handler: end at the next opportunity."""
        self.told = True

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % _LOGGING_STEPS:
            return
        decided = [time.monotonic() - self._last > self._seconds, self.told]
        broadcast_object_list(decided)
        due, self.told = decided
        control.should_save = control.should_save or due or self.told
        control.should_training_stop = control.should_training_stop or self.told

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_log = True

    def on_save(self, args, state, control, **kwargs):
        self._last = time.monotonic()


class Progress(ProgressCallback):
    """The progress bar, and a line for each evaluation, instead of one for each logged step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "eval_objective" in (logs or {}):
            parts = ("objective", "ce", "divergence", "agreement")
            figures = [f"{name} {logs[f'eval_{name}']:.4f}" for name in parts if f"eval_{name}" in logs]
            self.training_bar.write(f"epoch {logs['epoch']:g}: validation {', '.join(figures)}")


class StopAtNonsense(TrainerCallback):
    """Ends training, in words, at the first loss that is not a number."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "eval_objective"):
            if not math.isfinite((logs or {}).get(name, 0.0)):
                raise UserError(
                    f"training: expected a finite {name}, found {logs[name]} at step {state.global_step} of "
                    f"{state.max_steps}; lower learning_rate, or raise warmup_fraction"
                )


def newest_checkpoint(scratch: Path) -> Path | None:
    """The checkpoint that was made last, of those that are whole; says which are not."""
    found = sorted(scratch.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for checkpoint in found:
        try:
            json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            with safe_open(checkpoint / _CHECKPOINT, framework="pt") as file:
                file.keys()
            for path in checkpoint.glob("*.pt*"):
                if (broken := zipfile.ZipFile(path).testzip()) is not None:
                    raise ValueError(f"{path.name}: {broken} is damaged")
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            log.warning("%s is not whole (%s); looking for the one before it", checkpoint, error)
        else:
            return checkpoint
    return None


@contextmanager
def handling(signals: Iterable[signal.Signals], handler: Callable[..., None]) -> Iterator[None]:
    """In the block, `handler` is called for these signals."""
    before = {one: signal.signal(one, handler) for one in signals}
    try:
        yield
    finally:
        for one, previous in before.items():
            signal.signal(one, previous)


def train(
    model: DistillationModel,
    train_set: PackedDataset,
    validation_set: PackedDataset,
    optimisation: Optimisation,
    scratch: Path,
    *,
    early_stopping_epochs: int | None = None,
    after_step: Callable[[int], None] | None = None,
    data_workers: int = 0,
    device: str,
) -> list[dict[str, float]]:
    """Train `model.student` in place and leave it with the weights of the best validation epoch.

    Checkpoints are made in `scratch`, every epoch and every ten minutes, the best and the last being kept; where some
    are there already, training goes on from the last, and ends as if it had never been interrupted. On SIGTERM and
    SIGUSR1 one more is made, at the next logged step.

    The loss of a step is the mean over the answer tokens of all its micro-batches, in all processes; how many processes
    there are changes nothing but rounding. After each optimizer step, gradients still there, `after_step` is called
    with its number. Returns the history: one row a logged step, with training and validation figures, and no timings,
    so that equal runs have equal histories.

    Raises:
        Unfinished: a signal ended the training before its end.
        UserError: the loss is not finite, or the batch cannot be shared out.
    """
    processes = PartialState().num_processes
    batch_size, accumulation = micro_batches(optimisation, processes)
    if optimisation.gradient_checkpointing:
        model.student.gradient_checkpointing_enable({"use_reentrant": False})
    arguments = TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=optimisation.epochs,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
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
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,
        load_best_model_at_end=True,
        metric_for_best_model="objective",
        greater_is_better=False,
        logging_steps=_LOGGING_STEPS,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_num_workers=data_workers,
        report_to="none",
    )
    callbacks: list[TrainerCallback] = [EarlyStoppingCallback(early_stopping_epochs)] if early_stopping_epochs else []
    if after_step:
        callbacks.append(AfterStep(after_step))
    if arguments.n_gpu > 1:
        # One process drives one GPU; Trainer would spread the model over all it sees with DataParallel.
        arguments._n_gpu = 1
    trainer = DistillationTrainer(
        model=model,
        args=arguments,
        train_dataset=train_set.padded_to_multiple(processes * batch_size),
        eval_dataset=validation_set.padded_to_multiple(processes * batch_size),
        data_collator=train_set.collate,
        compute_metrics=model.metrics,
        callbacks=callbacks,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress)
    trainer.add_callback(StopAtNonsense)
    checkpoints = Checkpoints()
    trainer.add_callback(checkpoints)
    checkpoint = newest_checkpoint(scratch)
    if checkpoint:
        step = int(checkpoint.name.split("-")[1])
        log.info("resuming from step %d of %d, from %s", step, total_steps(len(train_set), optimisation), checkpoint)
    with handling((signal.SIGTERM, signal.SIGUSR1), checkpoints.tell):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if checkpoints.told:
        raise Unfinished(f"stopped by a signal after step {trainer.state.global_step}; run it again to go on")
    return [
        {name: value for name, value in row.items() if not name.endswith(("_runtime", "_per_second", "_flos"))}
        for row in trainer.state.log_history
    ]
