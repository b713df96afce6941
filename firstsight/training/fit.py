"""Training with the distillation loss: of a student from what is known of its teacher, and, without a teacher and with
alpha 0, supervised fine-tuning."""

import math
import signal
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback, TrainerCallback, TrainerState

from firstsight.core.errors import UserError
from firstsight.core.faults import check_disk_space
from firstsight.core.params import Optimisation
from firstsight.core.stage import log
from firstsight.models.loading import AUTOCAST
from firstsight.packing.dataset import PackedDataset
from firstsight.training import checkpoints
from firstsight.training.adapters import Tuning
from firstsight.training.checkpoints import Checkpoints, handling
from firstsight.training.distillation_model import DistillationModel
from firstsight.training.trainer import DistillationTrainer, Progress

# Optimizer steps from one logged loss to the next.
_LOGGING_STEPS = 10


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
    size = checkpoints.BYTES_PER_PARAMETER * sum(one.numel() for one in model.parameters() if one.requires_grad)
    # The first checkpoint and the next.
    check_disk_space(scratch, 2 * size, "free some space (dvc gc --workspace, make clean-scratch)")
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
        bf16=AUTOCAST[device],
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
    if data_workers:
        # Not through /dev/shm, of which a container has 64 MB: where it is full, the training would wait for ever.
        ForkingPickler.register(torch.Tensor, _by_value)
    return trainer


def _by_value(tensor: torch.Tensor) -> tuple:
    """How a data worker hands a tensor over: its bytes, through a pipe."""
    return _restored, (tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), tensor.dtype, tensor.shape)


def _restored(content: np.ndarray, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    return torch.from_numpy(content).view(dtype).reshape(shape)


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
