"""Generate the teacher's answers to questions that have none in the data: sequence-level distillation.

(Kim and Rush, 2016, arXiv:1606.07947.)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from firstsight.caching.shards import write_shared
from firstsight.core.errors import UserError
from firstsight.core.params import Targets
from firstsight.core.stage import log
from firstsight.distillation.targets import STAGE, Shards, SplitTargetsWriter
from firstsight.generation.answering import Question, answer_texts, generated_answers
from firstsight.records.sample import LETTERS, Record

# Name and folder of the shards, as if the answers were those of a split.
_ANSWERS = "answers"


@dataclass(frozen=True)
class TeacherAnswers:
    """Hold the teacher's answers, by record id, and read what the teacher computed for them.

    `texts` are the answers; "" replaces one that is no letter of the question's options.
    """

    texts: dict[str, str]
    _numbers: dict[str, int]
    _shards: Shards
    _has_states: bool

    def has_states(self, records: Sequence[Record], tokens: list[list[int]]) -> bool:
        """Return whether `states` has what the teacher computed for these answer `tokens` of the records.

        It has not where the data has an answer, where the teacher's was cut or is encoded otherwise than it was
        generated, and for targets of another kind than "hidden".
        """
        numbers = [self._numbers.get(record.id) for record in records]
        return self._has_states and all(
            number is not None and self._shards.tokens(number) == answer
            for number, answer in zip(numbers, tokens, strict=True)
        )

    def states(self, records: Sequence[Record]) -> Tensor:
        """Return the final hidden states [n, H] that predicted the n tokens generated for the records."""
        numbers = [self._numbers[record.id] for record in records]
        return torch.cat([self._shards.rows(range(number, number + 1))["hidden"] for number in numbers])


def generate_answers(
    model: PreTrainedModel | None,
    processor: ProcessorMixin,
    questions: list[Question],
    settings: Targets,
    folder: Path,
) -> TeacherAnswers:
    """Answer the questions with the teacher, which all processes share.

    What it computes is written to `folder` as it goes, and what is there already is not computed again. `model` may be
    None if there are no questions.

    Raises:
        UserError: none of the answers is usable.
    """

    def compute(batches: Sequence[Sequence[Question]]) -> Iterator[tuple]:
        for batch in batches:
            given = list(generated_answers(model, processor, batch, len(batch), settings.max_answer_tokens))
            tensors = {"answers": torch.tensor([token for answer in given for token in answer.tokens])}
            # Not for "topk", whose user may have no room for states: they are as large as targets of kind "hidden".
            if settings.kind == "hidden":
                tensors["hidden"] = torch.cat([answer.states for answer in given]).cpu()
            yield tensors, [len(answer.tokens) for answer in given], {}

    (folder / _ANSWERS).mkdir(exist_ok=True)
    batches = list(_batches(questions, settings.batch_size))
    label = f"{STAGE}: answers"
    write_shared(SplitTargetsWriter, folder / _ANSWERS, _ANSWERS, batches, compute, label, "questions")
    shards = Shards(folder / _ANSWERS, _ANSWERS)
    tokens = [shards.tokens(number) for number in range(len(shards))]
    texts = {
        record.id: text if not record.options or text in LETTERS[: len(record.options)] else ""
        for text, (_, record) in zip(answer_texts(model, processor, tokens) if tokens else [], questions, strict=True)
    }
    if questions:
        usable = sum(map(bool, texts.values()))
        log.info("the teacher answered %d of %d questions that have no answer", usable, len(questions))
        if not usable:
            raise UserError(
                f"models/teacher-finetuned: expected answers to the {len(questions)} questions that have none in the "
                "data, found no usable one; take a teacher that knows the task, or set finetune_teacher.enabled to "
                "true, or data.unanswered to refuse"
            )
    numbers = {record.id: number for number, (_, record) in enumerate(questions)}
    return TeacherAnswers(texts, numbers, shards, settings.kind == "hidden")


def _batches(questions: list[Question], samples: int) -> Iterator[list[Question]]:
    """Yield the questions about so many samples at a time."""
    by_sample = (list(group) for _, group in groupby(questions, key=lambda question: question[0].id))
    while batch := list(chain.from_iterable(islice(by_sample, samples))):
        yield batch
