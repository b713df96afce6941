"""A model in PyTorch, as the evaluation measures it."""

import platform
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from firstsight.generation import answering
from firstsight.generation.answering import Question


class PyTorchModel:
    """Hold a loaded model with its processor; `precision` says in words how its weights are stored."""

    def __init__(self, model: PreTrainedModel, processor: Any, precision: str):
        self._model, self._processor, self._precision = model, processor, precision

    def answers(self, questions: Sequence[Question], batch_size: int, max_new_tokens: int) -> Iterator[str]:
        """Yield the greedy answers as text, in the order of the questions."""
        return answering.answers(self._model, self._processor, questions, batch_size, max_new_tokens)

    def inputs(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        """Return the model's inputs for a batch of questions, each asked alone."""
        return answering.model_inputs(self._processor, questions, self._model.device)

    def generate(self, inputs: dict[str, Tensor], tokens: int) -> Tensor:
        """Return exactly `tokens` greedy tokens [B, tokens] of each question, as an application would get them."""
        return answering.generate(self._model, inputs, max_new_tokens=tokens, min_new_tokens=tokens)

    def parameter_count(self) -> int:
        """Return the number of parameters, also where 4-bit storage packs two in a byte."""
        return self._model.num_parameters()

    def environment(self) -> dict[str, str]:
        """Return what computes: the device's name with its threads, the engine with its version, the precision."""
        device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        if self._model.device.type == "cuda":
            device = torch.cuda.get_device_name()
        engine = f"PyTorch {torch.__version__}, transformers {transformers.__version__}"
        return {"device": device, "engine": engine, "precision": self._precision}
