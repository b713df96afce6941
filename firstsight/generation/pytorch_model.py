"""A model in PyTorch, as the evaluation measures it: one that generates answers, or one that scores classes."""

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from firstsight.core.errors import UserError
from firstsight.generation import answering
from firstsight.generation.answering import Question
from firstsight.models.footprint import parameters, token_bytes, weights_bytes
from firstsight.packing.dataset import class_batch
from firstsight.packing.forward import Normalisation, answer_states, class_scores
from firstsight.packing.pack import IGNORE, collate, encode, pack
from firstsight.packing.positions import check_positions, classes_tokens
from firstsight.records.text_loss import TextLoss

# Tokens whose logits are in memory together: 0.6 GB for 152,000 of them in float32.
_CHUNK = 1024


class PyTorchModel:
    """Hold a loaded model with its processor; `precision` says in words how its weights are stored.

    `weights_bytes` are the bytes of the weights in memory, `token_bytes` those of what each token of an answer reads.
    `parameters` is the number of weights, also where 4-bit storage packs several in a number.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, precision: str):
        self._model, self._processor, self._precision = model, processor, precision
        # Before the first answer, when bitsandbytes moves scales out of reach.
        self.weights_bytes, self.parameters = weights_bytes(model), parameters(model)
        self.token_bytes = self._token_bytes()

    def _token_bytes(self) -> int:
        return token_bytes(self._model)

    def answers(self, questions: Sequence[Question], batch_size: int, max_new_tokens: int) -> Iterator[str]:
        """Yield the greedy answers as text, in the order of the questions.

        Raises:
            UserError: the model has too few positions for a question and its answer, before any is answered.
        """
        for sample in {sample.id: sample for sample, _ in questions}.values():
            check_positions(self._processor, sample, max_new_tokens)
        return answering.answers(self._model, self._processor, questions, batch_size, max_new_tokens)

    def text_losses(self, texts: Sequence[Question], batch_size: int) -> Iterator[TextLoss]:
        """Yield the loss of each text, in their order, `batch_size` at a time.

        Raises:
            UserError: the model has too few positions for a text, before any is read.
        """
        for sample, _ in texts:
            check_positions(self._processor, sample, 0)
        return _text_losses(self._model, self._processor, texts, batch_size)

    def inputs(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        """Return the model's inputs for a batch of questions, each asked alone."""
        return answering.model_inputs(self._processor, questions, self._model.device)

    def generate(self, inputs: dict[str, Tensor], tokens: int) -> Tensor:
        """Return exactly `tokens` greedy tokens [B, tokens] of each question, as an application would get them.

        Returns when all are computed.

        Raises:
            MemoryError: the questions do not fit the GPU together.
            UserError: the model has too few positions for the tokens.
        """
        most, length = getattr(self._processor, "positions", None), inputs["input_ids"].shape[1]
        if most is not None and length + tokens > most:
            raise UserError(
                f"evaluate.latency_new_tokens: expected room for {tokens} tokens after a question of {length}, found "
                f"{most} positions in {self._model.name_or_path}; lower it, or shorten the questions"
            )
        with _to_its_end(self._model.device):
            return answering.generate(self._model, inputs, max_new_tokens=tokens, min_new_tokens=tokens)

    def copying(self, size: int) -> Callable[[], None]:
        """Return a function that copies `size` bytes within the device's memory, and returns when they are copied."""
        source = torch.ones(size, dtype=torch.uint8, device=self._model.device)
        target = torch.empty_like(source)

        def copy() -> None:
            target.copy_(source)
            if target.is_cuda:
                torch.cuda.synchronize()

        return copy

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, without special tokens around it; at least one text is given."""
        return [len(ids) for ids in self._processor.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def environment(self) -> dict[str, str]:
        """Return what computes: the device's name with its threads, the engine with its version, the precision."""
        device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        if self._model.device.type == "cuda":
            device = torch.cuda.get_device_name()
        engine = f"PyTorch {torch.__version__}, transformers {transformers.__version__}"
        return {"device": device, "engine": engine, "precision": self._precision}


class ClassModel(PyTorchModel):
    """Hold a loaded model with its processor and the names of the classes, see `PyTorchModel`.

    Nothing is generated, and no answer is cut. An answer is one pass over the question with all classes: `generate`
    takes as long for any number of tokens. `normalised` is applied to the scores of a language model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        precision: str,
        classes: Sequence[str],
        normalised: Normalisation,
    ):
        super().__init__(model, processor, precision)
        self._classes, self._normalised = classes, normalised

    def _token_bytes(self) -> int:
        # One pass reads all weights, and an encoder has no decoder.
        return self.weights_bytes

    def classify(self, questions: Sequence[Question]) -> list[tuple[str, float]]:
        """Return the class of the highest score of each question, and its probability among the classes.

        Raises:
            UserError: the model has too few positions for a question and a class.
        """
        wordings = classes_tokens(self._processor, self._classes)
        for sample in {sample.id: sample for sample, _ in questions}.values():
            check_positions(self._processor, sample, wordings)
        with torch.inference_mode():
            scores = self._scores(self.inputs(questions))
        best = scores.softmax(-1).max(-1)
        return [
            (self._classes[number], share)
            for number, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def inputs(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        """Return the model's inputs for a batch of questions, each with all classes."""
        batch = class_batch(self._processor, questions, self._classes)
        return {name: tensor.to(self._model.device) for name, tensor in batch.items()}

    @torch.inference_mode()
    def generate(self, inputs: dict[str, Tensor], tokens: int) -> Tensor:
        """Return the scores [B, C] of the classes for each question, when all are computed.

        Raises:
            MemoryError: the questions do not fit the GPU together.
        """
        with _to_its_end(self._model.device):
            return self._scores(inputs)

    def _scores(self, inputs: dict[str, Tensor]) -> Tensor:
        return self._normalised(class_scores(self._model, inputs, len(self._classes)))


@contextmanager
def _to_its_end(device: torch.device) -> Iterator[None]:
    """Wait, at the end of the block, for what it computes on a GPU. Raises MemoryError where that does not fit."""
    try:
        yield
        if device.type == "cuda":
            torch.cuda.synchronize()
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise MemoryError(str(error)) from None


@torch.inference_mode()
def _text_losses(
    model: PreTrainedModel, processor: Any, texts: Sequence[Question], batch_size: int
) -> Iterator[TextLoss]:
    """Yield the loss of each text, in their order; logits are in the model's dtype, and their softmax in float32."""
    end = processor.tokenizer.eos_token_id
    for start in range(0, len(texts), batch_size):
        some = texts[start : start + batch_size]
        packed = [pack(processor, sample, encode(processor, sample, [record])) for sample, record in some]
        batch = collate(packed, processor.tokenizer.pad_token_id)
        lengths = (batch["labels"] != IGNORE).sum(1).tolist()
        batch = {name: value.to(model.device) for name, value in batch.items()}
        states, tokens = answer_states(model, batch, batch["labels"])
        nats = _nats(model.get_output_embeddings(), states, tokens).split(lengths)
        for (_, record), own, ids in zip(some, nats, tokens.split(lengths), strict=True):
            cut = int(ids[-1]) != end
            read = processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False) if cut else record.answer
            yield TextLoss(float(own.double().sum()), len(ids), len(read.encode()), cut)


def _nats(head: Any, states: Tensor, tokens: Tensor) -> Tensor:
    """Return -log p of each of the n `tokens`, float32 [n] on the CPU, from the `states` [n, H] that predict them."""
    chunks = zip(states.split(_CHUNK), tokens.split(_CHUNK), strict=True)
    return torch.cat([cross_entropy(head(some).float(), ids, reduction="none") for some, ids in chunks]).cpu()
