"""Adapt Hugging Face's Trainer to a `DistillationModel`: checkpoints, sample order, and detection of bad losses."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_callback import ProgressCallback, TrainerCallback

from firstsight.core.errors import UserError
from firstsight.core.faults import writing
from firstsight.core.files import write_json
from firstsight.core.progress import on_terminal, progress
from firstsight.core.stage import log
from firstsight.packing.dataset import PackedDataset
from firstsight.records.length import estimated_tokens
from firstsight.training import checkpoints
from firstsight.training.adapters import TrainableModel
from firstsight.training.averaging import average_gradients, prepare_for_averaging
from firstsight.training.distillation_model import DistillationModel

# Training stops at a loss this many times the first.
_EXPLOSION_FACTOR = 100
# Files of a checkpoint besides the Trainer's.
_WEIGHTS, _METHOD_STATE = "trained.safetensors", "method.safetensors"


class DistillationTrainer(Trainer):
    """Train a `DistillationModel`, stop at bad losses, and resume exactly after an interruption.

    A checkpoint holds the trained parameters alone, the state of the fine-tuning method, the Trainer's own files, and,
    for exact resumption, the sum of losses since the last logged step.

    Methods of the Trainer that are overridden, private ones included; check them when transformers is upgraded:

        training_step           averages gradients once in a step, in the place of DistributedDataParallel
        log                     raises when the loss explodes
        _get_grad_norm          raises when the gradient is not finite, before the optimizer step spoils the weights
        _get_train_sampler      returns a sampler whose order does not depend on the number of processes
        _save                   saves the trained parameters and the method's state instead of the whole model
        _save_checkpoint        adds the running loss, then writes checksums and prunes older checkpoints
        _load_from_checkpoint   loads what `_save` saved
        _load_rng_state         restores the running loss; it is the last state to be loaded, after the Trainer has
                                zeroed its sums
        _load_best_model        does nothing: `train` loads the best checkpoint, even if the repository was moved since

    Also used are its private attributes `_tr_loss` (the running loss) and `_globalstep_last_logged`.
    """

    model: DistillationModel

    def __init__(self, *arguments: Any, trainable: TrainableModel | None, **named: Any):
        super().__init__(*arguments, **named)
        per_step, micro_batch = self._samples_per_step(), self.args.train_batch_size
        self._shuffle = EpochShuffle(self.train_dataset, self.args.seed, per_step, micro_batch)
        self._trainable = trainable
        self.add_callback(SetEpoch(self._shuffle, self._steps_per_epoch()))
        self._averages = self.accelerator.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
        if self._averages:
            prepare_for_averaging(self.model)
        if trainable is not None:
            self.add_callback(UpdateRanks(trainable))

    def load_weights(self, checkpoint: Path) -> None:
        """Load the trained parameters of a checkpoint."""
        self.model.load_state_dict(load_file(checkpoint / _WEIGHTS), strict=False)

    def training_step(self, model: nn.Module, *arguments: Any) -> Tensor:
        if not self._averages:
            return super().training_step(model, *arguments)
        with self.accelerator.no_sync(model):
            loss = super().training_step(model, *arguments)
        if self.accelerator.sync_gradients:
            average_gradients(model.parameters())
        return loss

    def _get_grad_norm(self, *arguments: Any, **named: Any) -> Tensor | float | None:
        # A loss that is not finite has no finite gradient; checking the loss itself would synchronise the GPU at every
        # micro-batch.
        norm = super()._get_grad_norm(*arguments, **named)
        if norm is not None and not math.isfinite(norm):
            raise self._training_error("finite loss and gradient", float(norm), self.state.global_step + 1)
        return norm

    def log(self, logs: dict[str, float], *arguments: Any) -> None:
        first = next((row["loss"] for row in self.state.log_history if "loss" in row), math.inf)
        if logs.get("loss", 0.0) > _EXPLOSION_FACTOR * max(1.0, first):
            raise self._training_error(f"loss near the first, {first:.3g}", logs["loss"], self.state.global_step)
        super().log(logs, *arguments)

    def _training_error(self, expected: str, found: float, step: int) -> UserError:
        """Return an error that names the records of an optimizer step."""
        dataset = self.train_dataset
        epoch, step_in_epoch = divmod(step - 1, self._steps_per_epoch())
        samples = self._samples_per_step()
        indices = self._shuffle.order(epoch)[step_in_epoch * samples : (step_in_epoch + 1) * samples]
        records = [record.id for index in indices for record in dataset.split[index].records]
        return UserError(
            f"training: expected a {expected}, found {found:.3g} at step {step} of {self.state.max_steps}; lower "
            "learning_rate, raise warmup_fraction, or look at the step's "
            f"{len(records)} records: {', '.join(records[:100])}"
        )

    def _samples_per_step(self) -> int:
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _steps_per_epoch(self) -> int:
        return math.ceil(len(self.train_dataset) / self._samples_per_step())

    def _get_train_sampler(self, train_dataset: PackedDataset | None = None) -> "EpochShuffle":
        return self._shuffle

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder, values = Path(output_dir or self.args.output_dir), state_dict or self.model.state_dict()
        folder.mkdir(parents=True, exist_ok=True)
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        save_file({name: values[name].contiguous() for name in trained}, folder / _WEIGHTS)
        if self._trainable is not None:
            save_file(self._trainable.state_dict(), folder / _METHOD_STATE)

    def _save_checkpoint(self, model: nn.Module, trial: None) -> None:
        scratch = Path(self.args.output_dir)
        checkpoint = scratch / f"checkpoint-{self.state.global_step}"
        running = {"loss": self._tr_loss.item(), "logged": self._globalstep_last_logged}
        with writing(checkpoint):
            super()._save_checkpoint(model, trial)
            write_json(checkpoint / self._running_loss_file, running)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            with writing(checkpoint):
                checkpoints.mark_complete(checkpoint)
            checkpoints.prune(scratch)
        self.accelerator.wait_for_everyone()

    @property
    def _running_loss_file(self) -> str:
        """Return the name of this process's file: each process sums the losses of its own micro-batches."""
        return f"running-{self.args.process_index}.json"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_weights(Path(resume_from_checkpoint))
        if self._trainable is not None:
            self._trainable.load_state_dict(load_file(Path(resume_from_checkpoint) / _METHOD_STATE))

    def _load_rng_state(self, checkpoint: str) -> None:
        super()._load_rng_state(checkpoint)
        running = json.loads((Path(checkpoint) / self._running_loss_file).read_text(encoding="utf-8"))
        self._tr_loss += running["loss"]
        self._globalstep_last_logged = running["logged"]

    def _load_best_model(self) -> None:
        """Do nothing: `fit.train` loads the best weights."""


class EpochShuffle(Sampler[int]):
    """Yield a dataset's samples in an order that depends on seed and epoch alone, then its padding samples.

    The steps of an epoch then have the same samples for any number of processes. Where a step is made of several
    micro-batches, its samples come with the longest first, so that those of a micro-batch are of about the same length
    and need little padding. A step's loss is a sum over its samples, so their order changes rounding alone, and which
    numbers dropout draws for a sample.

    Args:
        samples_per_step: the samples of an optimizer step.
        micro_batch: the samples that a process computes at a time.
    """

    def __init__(self, dataset: PackedDataset, seed: int, samples_per_step: int, micro_batch: int):
        self._dataset, self._seed, self._epoch = dataset, seed, 0
        self._samples_per_step, self._sorts = samples_per_step, samples_per_step > micro_batch
        self._lengths: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[int]:
        order = self.order(self._epoch)
        for start in range(0, len(order), self._samples_per_step):
            step = order[start : start + self._samples_per_step]
            if self._sorts:
                step.sort(key=self._length, reverse=True)
            yield from step
        yield from range(len(order), len(self))

    def _length(self, index: int) -> float:
        """Return about how many tokens a sample has, for which it is read once."""
        if index not in self._lengths:
            sample = self._dataset.split[index]
            self._lengths[index] = estimated_tokens(sample, sample.records)
        return self._lengths[index]

    def order(self, epoch: int) -> list[int]:
        """Return the order of an epoch's samples, without padding samples, and with each step's own in any order."""
        generator = torch.Generator().manual_seed(self._seed + epoch)
        return torch.randperm(len(self._dataset.split), generator=generator).tolist()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is yielded next."""
        self._epoch = epoch


class UpdateRanks(TrainerCallback):
    """Call `TrainableModel.update_ranks` after each optimizer step, before gradients are zeroed."""

    def __init__(self, trainable: TrainableModel):
        self._trainable = trainable

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._trainable.update_ranks(state.global_step)


class SetEpoch(TrainerCallback):
    """Set the sampler's epoch as each epoch begins.

    The Trainer's own call does not reach the sampler when several processes resume within an epoch: the data loader
    that skips the epoch's first batches wraps the sampler once more.
    """

    def __init__(self, shuffle: EpochShuffle, steps_per_epoch: int):
        self._shuffle, self._steps_per_epoch = shuffle, steps_per_epoch

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._shuffle.set_epoch(state.global_step // self._steps_per_epoch)


class ShowProgress(ProgressCallback):
    """Show the progress of the training, on a terminal also of each evaluation, and a line per evaluation."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = progress(
                desc="training", unit="steps", total=state.max_steps, initial=state.global_step
            )

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if on_terminal():
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        if state.is_world_process_zero and self.training_bar is not None and "eval_objective" in logs:
            parts = ("objective", "ce", "divergence", "agreement", "accuracy")
            figures = [f"{name} {logs[f'eval_{name}']:.4f}" for name in parts if f"eval_{name}" in logs]
            line = f"epoch {logs['epoch']:g}: validation {', '.join(figures)}"
            if on_terminal():
                self.training_bar.write(line)  # which keeps it off the bar
            else:
                log.info(line)

    def close(self) -> None:
        """Close the bars, so that messages after an interruption start on a new line."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()
