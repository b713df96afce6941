"""Hugging Face's Trainer over a `DistillationModel`: its checkpoints, the order of its samples, and when it stops."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_callback import ProgressCallback, TrainerCallback

from firstsight.core.errors import UserError
from firstsight.core.faults import writing
from firstsight.core.files import write_json
from firstsight.packing.dataset import PackedDataset
from firstsight.training import checkpoints
from firstsight.training.adapters import Tuning
from firstsight.training.distillation_model import DistillationModel

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

    def _get_grad_norm(self, *arguments: Any, **named: Any) -> Tensor | float | None:
        # Before the optimizer's step: the weights are still good. A loss that is not finite has no finite gradient, and
        # to look at the loss of each micro-batch would have a GPU wait for each.
        norm = super()._get_grad_norm(*arguments, **named)
        if norm is not None and not math.isfinite(norm):
            raise self._nonsense("finite loss and gradient", float(norm), coming=1)
        return norm

    def log(self, logs: dict[str, float], *arguments: Any) -> None:
        first = next((row["loss"] for row in self.state.log_history if "loss" in row), math.inf)
        if logs.get("loss", 0.0) > _EXPLODED * max(1.0, first):
            raise self._nonsense(f"loss near the first, {first:.3g}", logs["loss"])
        super().log(logs, *arguments)

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
