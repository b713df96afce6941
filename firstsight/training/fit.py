"""Train a model with the distillation loss; without a teacher, at alpha 0, that is supervised fine-tuning."""

import math
import signal
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainingArguments
from transformers.trainer_callback import ProgressCallback, TrainerCallback, TrainerState

from firstsight.core.errors import UserError
from firstsight.core.faults import check_disk_space
from firstsight.core.params import Optimisation
from firstsight.core.stage import log
from firstsight.models.architecture import draws_random_numbers
from firstsight.models.device import has_bfloat16
from firstsight.packing.dataset import PackedDataset
from firstsight.training import checkpoints
from firstsight.training.adapters import TrainableModel
from firstsight.training.checkpoints import CheckpointCallback, signal_handler
from firstsight.training.compiled_layers import LEAST_BATCHES, compile_layers
from firstsight.training.cuda_graphs import GraphedLanguageModel, can_record
from firstsight.training.distillation_model import DistillationModel
from firstsight.training.optimizer import moments_bytes, trainer_name
from firstsight.training.trainer import DistillationTrainer, ShowProgress

# Ways to train in which each process has the whole model.
_WHOLE = (DistributedType.NO, DistributedType.MULTI_GPU)
# Optimizer steps between two logged losses.
_LOGGING_STEPS = 10


def train(
    model: DistillationModel,
    train_set: PackedDataset,
    validation_set: PackedDataset,
    optimisation: Optimisation,
    scratch: Path,
    *,
    early_stopping_epochs: int | None = None,
    best: str = "objective",
    save_final: Callable[[], None] | None = None,
    trainable: TrainableModel | None = None,
    data_workers: int = 0,
    device: str,
) -> list[dict[str, float]]:
    """Train `model.student` in place and leave it with the weights of the best validation epoch.

    Checkpoints are written to `scratch` after every epoch and every ten minutes, and at most three are kept. If there
    are checkpoints already, training resumes from the last usable one and ends as if it had not been interrupted. After
    SIGTERM or SIGUSR1, a last checkpoint is written at the end of the current step.

    The loss of a step is the mean over the answer tokens of all its micro-batches, in all processes; the number of
    processes changes rounding alone. A single process that runs out of memory continues from its last checkpoint: with
    `auto_batch`, by micro-batches of half the size or less, and as many more of them per step; where that is not asked
    for, or they are of one sample, without CUDA graphs if there are any.

    Args:
        trainable: the model as its fine-tuning method prepared it, for the state of that method.
        early_stopping_epochs: epochs without improvement after which training stops; None for all epochs.
        best: the validation metric of the best epoch: "objective", the least, or "accuracy", the highest.
        save_final: called while the model has the weights of the last step; None: they are not kept.

    Returns:
        The history: a row per logged step, with training and validation metrics, and without timings, so that equal
        runs have equal histories.

    Raises:
        Unfinished: a signal stopped the training before its end.
        UserError: a loss or gradient is not finite or explodes, memory runs out, the batch cannot be divided among the
            processes, the optimizer does not run on the device, or a checkpoint holds arbitrary objects.
    """
    processes = PartialState().num_processes
    batch_size, accumulation = micro_batches(optimisation, processes)
    if optimisation.gradient_checkpointing:
        # The state of random numbers, which no graph can hold, is kept for layers that draw some.
        again = {"use_reentrant": False, "preserve_rng_state": draws_random_numbers(model.student)}
        model.student.gradient_checkpointing_enable(again)
    # The last two checkpoints.
    check_disk_space(
        scratch, 2 * _checkpoint_bytes(model, optimisation), "free some space (dvc gc --workspace, make clean-scratch)"
    )
    restarts, graphs = _restarts(optimisation, device), None
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    start = {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained.items()} if restarts else {}
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
            best=best,
            trainable=trainable,
            data_workers=data_workers,
            device=device,
        )
        if graphs is None and _replays(trainer):
            graphs = speed_up(model.student, train_set, optimisation)
        try:
            _train_or_resume(trainer, scratch)
            break
        except torch.OutOfMemoryError:
            halves = restarts and optimisation.auto_batch and batch_size > 1
            if not halves and not (restarts and graphs is not None and graphs.stop()):
                raise UserError(
                    f"memory: expected enough for micro-batches of {batch_size}, found too little; lower batch_size "
                    "and raise gradient_accumulation_steps (auto_batch: true does so), or set gradient_checkpointing: "
                    "true, method: lora, or a lower data.max_pixels"
                ) from None
        # Not in the except block, where the error still refers to tensors of the step.
        del trainer
        if halves:
            samples_per_step = batch_size * accumulation
            batch_size = max(size for size in range(1, batch_size // 2 + 1) if samples_per_step % size == 0)
            accumulation = samples_per_step // batch_size
            log.warning("out of memory: continuing with micro-batches of %d, %d per step", batch_size, accumulation)
            if graphs is not None:
                graphs.clear()
        else:
            log.warning(
                "out of memory: continuing without CUDA graphs, which is slower; gradient_checkpointing: true or a "
                "lower batch_size would leave room for them"
            )
        model.zero_grad()
        model.load_state_dict(start, strict=False)
        if trainable is not None:
            trainable.load_state_dict({})
        if device == "cuda":
            torch.cuda.empty_cache()
    if save_final is not None:
        # A training that had ended before it was resumed has loaded no weights.
        trainer.load_weights(scratch / f"checkpoint-{trainer.state.global_step}")
        save_final()
    trainer.load_weights(scratch / f"checkpoint-{trainer.state.best_global_step}")
    return [
        # Keys are sorted, because rows read from a checkpoint have them in another order. The Trainer's eval_loss is a
        # mean over batches, however many answer tokens they have; eval_objective is the mean over answer tokens.
        {
            name: value
            for name, value in sorted(row.items())
            if name != "eval_loss" and not name.endswith(("_runtime", "_per_second", "_flos"))
        }
        for row in trainer.state.log_history
        if "train_loss" not in row  # summary of the steps since the last interruption
    ]


def _restarts(optimisation: Optimisation, device: str) -> bool:
    """Return whether training begins again where memory runs out: with smaller micro-batches, or without graphs."""
    return (optimisation.auto_batch or device == "cuda") and PartialState().num_processes == 1


def _replays(trainer: DistillationTrainer) -> bool:
    """Return whether passes may be recorded: on CUDA, unless FSDP or the like gathers weights as they are needed."""
    return trainer.accelerator.distributed_type in _WHOLE and trainer.args.device.type == "cuda"


def speed_up(
    student: PreTrainedModel, train_set: PackedDataset, optimisation: Optimisation
) -> GraphedLanguageModel | None:
    """Let the passes of a student on a GPU be replayed as CUDA graphs, and compile its layers for a long training.

    Returns the graphs, or None where nothing can be recorded.
    """
    if not can_record(student, optimisation):
        return None
    graphs = GraphedLanguageModel(student)
    batch_size, accumulation = micro_batches(optimisation, PartialState().num_processes)
    if total_steps(len(train_set), optimisation) * accumulation >= LEAST_BATCHES:
        # Everywhere as where graphs are recorded: other settings of autocast would be compiled once more.
        torch.set_autocast_cache_enabled(False)
        # Two samples, if micro-batches have several: code for one sample is for one alone.
        samples = min(2, batch_size, len(train_set))
        batch = train_set.collate([train_set[index] for index in range(samples)])
        batch.pop("teacher", None)
        dtype = torch.bfloat16 if has_bfloat16(student.device.type) else None
        with graphs.unrecorded():
            compile_layers(student.train(), {name: one.to(student.device) for name, one in batch.items()}, dtype)
    return graphs


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
    best: str,
    trainable: TrainableModel | None,
    data_workers: int,
    device: str,
) -> DistillationTrainer:
    arguments = TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=optimisation.epochs,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        optim=trainer_name(optimisation.optimizer, device),
        learning_rate=optimisation.learning_rate,
        warmup_steps=optimisation.warmup_fraction,
        weight_decay=optimisation.weight_decay,
        max_grad_norm=optimisation.max_grad_norm,
        lr_scheduler_type="cosine",
        seed=optimisation.seed,
        use_cpu=device == "cpu",
        bf16=has_bfloat16(device),
        eval_strategy="epoch",
        save_strategy="epoch",
        restore_callback_states_from_checkpoint=True,
        load_best_model_at_end=True,
        metric_for_best_model=best,
        greater_is_better=best == "accuracy",
        logging_steps=_LOGGING_STEPS,
        logging_nan_inf_filter=False,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_num_workers=data_workers,
        report_to="none",
    )
    global_micro_batch = PartialState().num_processes * micro_batch
    callbacks: list[TrainerCallback] = [EarlyStoppingCallback(early_stopping_epochs)] if early_stopping_epochs else []
    if arguments.n_gpu > 1:
        # One process drives one GPU; the Trainer would use all visible GPUs with DataParallel.
        arguments._n_gpu = 1
    trainer = DistillationTrainer(
        model=model,
        args=arguments,
        train_dataset=train_set.padded_to_multiple(global_micro_batch),
        eval_dataset=validation_set.padded_to_multiple(global_micro_batch),
        data_collator=train_set.collate,
        compute_metrics=model.metrics,
        callbacks=callbacks,
        trainable=trainable,
    )
    trainer.remove_callback(ProgressCallback)
    if data_workers:
        # Not through /dev/shm, of which a container has 64 MB: where it is full, the training would wait forever.
        ForkingPickler.register(torch.Tensor, _by_value)
    return trainer


def _checkpoint_bytes(model: DistillationModel, optimisation: Optimisation) -> int:
    """Return the bytes of a checkpoint: float32 weights and AdamW's moments."""
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    embedding = model.student.get_input_embeddings().weight
    in_embedding = embedding.numel() if embedding.requires_grad else 0
    return 4 * trained + math.ceil(moments_bytes(optimisation.optimizer, trained, in_embedding))


def _by_value(tensor: torch.Tensor) -> tuple:
    """Reduce a tensor that a data worker hands over to its bytes, which go through a pipe."""
    return _restored, (tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), tensor.dtype, tensor.shape)


def _restored(content: np.ndarray, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    return torch.from_numpy(content).view(dtype).reshape(shape)


def _train_or_resume(trainer: DistillationTrainer, scratch: Path) -> None:
    """Train to the end, from the last usable checkpoint if there is one."""
    checkpointing, progress = CheckpointCallback(), ShowProgress()
    trainer.add_callback(checkpointing)
    trainer.add_callback(progress)
    latest = checkpoints.latest_usable(scratch) if PartialState().is_main_process else None
    latest = broadcast_object_list([latest])[0]
    if latest and PartialState().is_main_process:
        state = checkpoints.trainer_state(latest)
        log.info("resuming from step %d of %d, from %s", state["global_step"], state["max_steps"], latest)
    if latest and checkpoints.is_final(latest):
        trainer.state = TrainerState(**checkpoints.trainer_state(latest))
        return
    try:
        with signal_handler((signal.SIGTERM, signal.SIGUSR1), checkpointing.request_stop):
            trainer.train(resume_from_checkpoint=str(latest) if latest else None)
    except UnpicklingError as error:
        raise UserError(
            f"{latest}: expected a checkpoint of tensors and numbers, found other objects, which were not loaded; "
            f"make clean-scratch ({str(error).splitlines()[0][:120]})"
        ) from None
    finally:
        progress.close()


def micro_batches(optimisation: Optimisation, processes: int) -> tuple[int, int]:
    """Return the samples of a process's micro-batch, and its number of micro-batches per optimizer step.

    A step takes `batch_size x gradient_accumulation_steps` samples whatever the number of processes.

    Raises:
        UserError: the samples of a step cannot be divided evenly among the processes.
    """
    step = optimisation.batch_size * optimisation.gradient_accumulation_steps
    if step % processes:
        raise UserError(
            f"params.yaml: expected batch_size x gradient_accumulation_steps to be a multiple of the {processes} "
            f"processes, found {optimisation.batch_size} x {optimisation.gradient_accumulation_steps}; change one"
        )
    per_process = step // processes
    micro = max(size for size in range(1, optimisation.batch_size + 1) if per_process % size == 0)
    return micro, per_process // micro


def total_steps(samples: int, optimisation: Optimisation) -> int:
    """Return the optimizer steps of a training on `samples` samples, without early stopping."""
    step = optimisation.batch_size * optimisation.gradient_accumulation_steps
    return math.ceil(optimisation.epochs * math.ceil(samples / step))
