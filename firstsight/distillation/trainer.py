"""Training with the distillation loss on Hugging Face's Trainer: of a student from what is known of its teacher, and,
without a teacher and with alpha 0, supervised fine-tuning."""

import json
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, EvalPrediction, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback, TrainerCallback, TrainerState

from firstsight.core.errors import UserError
from firstsight.core.faults import check_room, writing
from firstsight.core.files import write_json
from firstsight.core.params import Optimisation, Train
from firstsight.core.stage import log
from firstsight.data.dataset import PackedDataset
from firstsight.distillation import checkpoints
from firstsight.distillation.checkpoints import Checkpoints, handling
from firstsight.distillation.loss import Divergence, HiddenTeacher, Teacher, TopKTeacher, distillation_loss
from firstsight.models.adapters import Tuning
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


# Optimizer steps from one logged loss to the next.
_LOGGING_STEPS = 10
# How many times the first loss is no longer learning.
_EXPLODED = 100
# What a checkpoint holds besides what the Trainer keeps.
_WEIGHTS, _METHOD = "trained.safetensors", "method.safetensors"


class DistillationTrainer(Trainer):
    """HF Trainer over a `DistillationModel`, that stops at nonsense, and goes on after an interruption as without it.

    Its checkpoints hold what is trained of the student, and that alone; besides what the Trainer keeps, the sum of the
    losses since the last logged step, and what the method of training keeps.
    """

    model: DistillationModel

    def __init__(self, *arguments: Any, tuning: Tuning | None, **named: Any):
        self._shuffle = EpochShuffle(named["train_dataset"], named["args"].seed)
        super().__init__(*arguments, **named)
        self._tuning = tuning
        self.add_callback(BeginEpoch(self._shuffle, self._steps_an_epoch()))
        if tuning is not None:
            self.add_callback(AfterStep(tuning))

    def load_weights(self, checkpoint: Path) -> None:
        self.model.load_state_dict(load_file(checkpoint / _WEIGHTS), strict=False)

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        loss = super().training_step(*arguments, **named)
        self._check_finite("loss", loss)
        return loss

    def _get_grad_norm(self, *arguments: Any, **named: Any) -> Tensor | float | None:
        norm = super()._get_grad_norm(*arguments, **named)
        self._check_finite("gradient norm", norm)  # before the optimizer's step: the weights are still good
        return norm

    def log(self, logs: dict[str, float], *arguments: Any) -> None:
        first = next((row["loss"] for row in self.state.log_history if "loss" in row), math.inf)
        if logs.get("loss", 0.0) > _EXPLODED * max(1.0, first):
            raise self._nonsense(f"loss near the first, {first:.3g}", logs["loss"])
        super().log(logs, *arguments)

    def _check_finite(self, what: str, value: Tensor | float | None) -> None:
        if value is not None and not math.isfinite(value):
            raise self._nonsense(f"finite {what}", float(value), coming=1)

    def _nonsense(self, expected: str, found: float, coming: int = 0) -> UserError:
        """In words, with the records of the last optimizer step, or of the one to come."""
        dataset, step = self.train_dataset, self.state.global_step + coming
        epoch, place = divmod(step - 1, self._steps_an_epoch())
        samples = self._samples_a_step()
        shuffle = EpochShuffle(dataset, self.args.seed)
        shuffle.set_epoch(epoch)
        indices = list(shuffle)[place * samples : (place + 1) * samples]
        shown = [index for index in indices if index < len(dataset.split)]  # not what fills the last step up
        records = [record.id for index in shown for record in dataset.split[index].records]
        return UserError(
            f"training: expected a {expected}, found {found:.3g} at step {step} of {self.state.max_steps}; lower "
            "learning_rate, raise warmup_fraction, or look at the step's "
            f"{len(records)} records: {', '.join(records[:100])}"
        )

    def _samples_a_step(self) -> int:
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _steps_an_epoch(self) -> int:
        return math.ceil(len(self.train_dataset) / self._samples_a_step())

    def _get_train_sampler(self, train_dataset: PackedDataset | None = None) -> "EpochShuffle":
        return self._shuffle

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder, values = Path(output_dir or self.args.output_dir), state_dict or self.model.state_dict()
        folder.mkdir(parents=True, exist_ok=True)
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        save_file({name: values[name].contiguous() for name in trained}, folder / _WEIGHTS)
        if self._tuning is not None:
            save_file(self._tuning.state(), folder / _METHOD)

    def _save_checkpoint(self, model: nn.Module, trial: None) -> None:
        scratch = Path(self.args.output_dir)
        checkpoint = scratch / f"checkpoint-{self.state.global_step}"
        running = {"loss": self._tr_loss.item(), "logged": self._globalstep_last_logged}
        with writing(checkpoint):
            super()._save_checkpoint(model, trial)
            write_json(checkpoint / self._running, running)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            with writing(checkpoint):
                checkpoints.seal(checkpoint)
            checkpoints.prune(scratch)
        self.accelerator.wait_for_everyone()

    @property
    def _running(self) -> str:
        """Each process sums the losses of its own micro-batches."""
        return f"running-{self.args.process_index}.json"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_weights(Path(resume_from_checkpoint))
        if self._tuning is not None:
            self._tuning.restore(load_file(Path(resume_from_checkpoint) / _METHOD))

    def _load_rng_state(self, checkpoint: str) -> None:
        # The last of the state to be loaded, after the Trainer has set its sums to nothing.
        super()._load_rng_state(checkpoint)
        running = json.loads((Path(checkpoint) / self._running).read_text(encoding="utf-8"))
        self._tr_loss += running["loss"]
        self._globalstep_last_logged = running["logged"]

    def _load_best_model(self) -> None:
        """Left to `train`, which finds it even if the repository has been moved since the checkpoint was made."""


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
        """Called as an epoch begins."""
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
    """Tells the method of training of each optimizer step, while the gradients are still there."""

    def __init__(self, tuning: Tuning):
        self._tuning = tuning

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._tuning.after_step(state.global_step)


class BeginEpoch(TrainerCallback):
    """Tells the sampler which epoch it is. The Trainer does not reach it where a resumed epoch's first batches are left
    out and several processes share the rest: the sampler is then wrapped once too often."""

    def __init__(self, shuffle: EpochShuffle, steps_an_epoch: int):
        self._shuffle, self._steps = shuffle, steps_an_epoch

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._shuffle.set_epoch(state.global_step // self._steps)


class Progress(ProgressCallback):
    """The progress bar, and a line for each evaluation, instead of one for each logged step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "eval_objective" in (logs or {}):
            parts = ("objective", "ce", "divergence", "agreement")
            figures = [f"{name} {logs[f'eval_{name}']:.4f}" for name in parts if f"eval_{name}" in logs]
            self.training_bar.write(f"epoch {logs['epoch']:g}: validation {', '.join(figures)}")

    def close(self) -> None:
        """End the bars' line, for what is said of an interruption to have its own."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()


def train(
    model: DistillationModel,
    train_set: PackedDataset,
    validation_set: PackedDataset,
    optimisation: Optimisation,
    scratch: Path,
    *,
    early_stopping_epochs: int | None = None,
    tuning: Tuning | None = None,
    data_workers: int = 0,
    device: str,
) -> list[dict[str, float]]:
    """Train `model.student` in place and leave it with the weights of the best validation epoch.

    Checkpoints are made in `scratch`, every epoch and every ten minutes, at most three being kept; where some are there
    already, training goes on from the last that is whole, and ends as if it had never been interrupted. On SIGTERM and
    SIGUSR1 one more is made, after the step under way.

    The loss of a step is the mean over the answer tokens of all its micro-batches, in all processes; how many processes
    there are changes nothing but rounding. `tuning` is told of each optimizer step. Returns the history: one row a
    logged step, with training and validation figures, and no timings, so that equal runs have equal histories.

    With `auto_batch`, where memory does not suffice, a single process goes on with micro-batches of half the size or
    less, and as many more of them to a step.

    Raises:
        Unfinished: a signal ended the training before its end.
        UserError: a loss or gradient is not finite or explodes, memory is spent, the batch cannot be shared out, or a
            checkpoint is not ours.
    """
    processes = PartialState().num_processes
    batch_size, accumulation = micro_batches(optimisation, processes)
    if optimisation.gradient_checkpointing:
        model.student.gradient_checkpointing_enable({"use_reentrant": False})
    size = 12 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    check_room(scratch, 2 * size)  # the first checkpoint and the next: weights and two moments, in float32
    halving = optimisation.auto_batch and processes == 1
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    start = {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained.items()} if halving else {}
    while True:
        trainer = _trainer(
            model,
            train_set,
            validation_set,
            optimisation,
            scratch,
            micro_batch=batch_size,
            accumulation=accumulation,
            early_stopping_epochs=early_stopping_epochs,
            tuning=tuning,
            data_workers=data_workers,
            device=device,
        )
        try:
            _run(trainer, scratch)
            break
        except torch.OutOfMemoryError:
            if not halving or batch_size == 1:
                raise UserError(
                    f"memory: expected enough for micro-batches of {batch_size}, found it spent; lower batch_size and "
                    "raise gradient_accumulation_steps (auto_batch: true does so), or set gradient_checkpointing: "
                    "true, method: lora, or a lower data.max_pixels"
                ) from None
        # Here, not above, where the error still holds what was computed.
        del trainer
        share = batch_size * accumulation
        batch_size = max(size for size in range(1, batch_size // 2 + 1) if share % size == 0)
        accumulation = share // batch_size
        log.warning("memory is spent: micro-batches of %d from now on, %d to a step", batch_size, accumulation)
        model.zero_grad()
        model.load_state_dict(start, strict=False)
        if tuning is not None:
            tuning.restore({})
        if device == "cuda":
            torch.cuda.empty_cache()
    trainer.load_weights(scratch / f"checkpoint-{trainer.state.best_global_step}")
    return [
        # In one order: rows that were read back from a checkpoint have another than those that were not. The Trainer's
        # eval_loss is a mean of batches, whatever their number of answers; eval_objective is that of the answers.
        {
            name: value
            for name, value in sorted(row.items())
            if name != "eval_loss" and not name.endswith(("_runtime", "_per_second", "_flos"))
        }
        for row in trainer.state.log_history
        if "train_loss" not in row  # of what was trained since the last interruption
    ]


def _trainer(
    model: DistillationModel,
    train_set: PackedDataset,
    validation_set: PackedDataset,
    optimisation: Optimisation,
    scratch: Path,
    *,
    micro_batch: int,
    accumulation: int,
    early_stopping_epochs: int | None,
    tuning: Tuning | None,
    data_workers: int,
    device: str,
) -> DistillationTrainer:
    arguments = TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=optimisation.epochs,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
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
        restore_callback_states_from_checkpoint=True,
        load_best_model_at_end=True,
        metric_for_best_model="objective",
        greater_is_better=False,
        logging_steps=_LOGGING_STEPS,
        logging_nan_inf_filter=False,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_num_workers=data_workers,
        report_to="none",
    )
    together = PartialState().num_processes * micro_batch
    callbacks: list[TrainerCallback] = [EarlyStoppingCallback(early_stopping_epochs)] if early_stopping_epochs else []
    if arguments.n_gpu > 1:
        # One process drives one GPU; Trainer would spread the model over all it sees with DataParallel.
        arguments._n_gpu = 1
    trainer = DistillationTrainer(
        model=model,
        args=arguments,
        train_dataset=train_set.padded_to_multiple(together),
        eval_dataset=validation_set.padded_to_multiple(together),
        data_collator=train_set.collate,
        compute_metrics=model.metrics,
        callbacks=callbacks,
        tuning=tuning,
    )
    trainer.remove_callback(ProgressCallback)
    return trainer


def _run(trainer: DistillationTrainer, scratch: Path) -> None:
    """Train from the last checkpoint that is whole, if there is one, to the end."""
    asked, progress = Checkpoints(), Progress()
    trainer.add_callback(asked)
    trainer.add_callback(progress)
    found = broadcast_object_list([checkpoints.newest(scratch) if PartialState().is_main_process else None])[0]
    if found and PartialState().is_main_process:
        state = checkpoints.state(found)
        log.info("resuming from step %d of %d, from %s", state["global_step"], state["max_steps"], found)
    if found and checkpoints.ended(found):
        trainer.state = TrainerState(**checkpoints.state(found))
        return
    try:
        with handling((signal.SIGTERM, signal.SIGUSR1), asked.tell):
            trainer.train(resume_from_checkpoint=str(found) if found else None)
    except UnpicklingError as error:
        raise UserError(
            f"{found}: expected a checkpoint of tensors and numbers, found something else; it was not run, nor "
            f"used: make clean-scratch ({str(error).splitlines()[0][:120]})"
        ) from None
    finally:
        progress.close()
