"""Generate the teacher's answers to questions that have none in the data: sequence-level distillation.

(Kim and Rush, 2016, arXiv:1606.07947.)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from firstsight.caching.shards import write_shared
from firstsight.core.errors import UserError
from firstsight.core.params import Targets
from firstsight.core.stage import log
from firstsight.distillation.targets import STAGE, Shards, SplitTargetsWriter
from firstsight.generation.answering import answer_texts, generated_answers
from firstsight.records.parquet import Split
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
    splits: Sequence[Split],
    settings: Targets,
    folder: Path,
) -> TeacherAnswers:
    """Answer the questions of the splits that have no answer with the teacher, which all processes share.

    What it computes is written to `folder` as it goes, and what is there already is not computed again. `model` may be
    None if there are no questions.

    Raises:
        UserError: none of the answers is usable.
    """
    # Samples are read when they are asked about, because the frames of all would fill the memory.
    unanswered = [(split, row, records) for split in splits for row, records in split.unanswered().items()]
    asked = [record for *_, records in unanswered for record in records]

    def compute(batches: Sequence[Sequence[tuple[Split, int, list[Record]]]]) -> Iterator[tuple]:
        for batch in batches:
            samples = [(split[row], records) for split, row, records in batch]
            questions = [(sample, record) for sample, records in samples for record in records]
            given = list(generated_answers(model, processor, questions, len(questions), settings.max_answer_tokens))
            tensors = {"answers": torch.tensor([token for answer in given for token in answer.tokens])}
            # Not for "topk", whose user may have no room for states: they are as large as targets of kind "hidden".
            if settings.kind == "hidden":
                tensors["hidden"] = torch.cat([answer.states for answer in given]).cpu()
            yield tensors, [len(answer.tokens) for answer in given], {}

    (folder / _ANSWERS).mkdir(exist_ok=True)
    size, label = settings.batch_size, f"{STAGE}: answers"
    batches = [unanswered[start : start + size] for start in range(0, len(unanswered), size)]
    write_shared(SplitTargetsWriter, folder / _ANSWERS, _ANSWERS, batches, compute, label, "samples")
    shards = Shards(folder / _ANSWERS, _ANSWERS)
    tokens = [shards.tokens(number) for number in range(len(shards))]
    texts = {
        record.id: text if not record.options or text in LETTERS[: len(record.options)] else ""
        for text, record in zip(answer_texts(model, processor, tokens) if tokens else [], asked, strict=True)
    }
    if asked:
        usable = sum(map(bool, texts.values()))
        log.info("the teacher answered %d of %d questions that have no answer", usable, len(asked))
        if not usable:
            raise UserError(
                f"models/teacher-finetuned: expected answers to the {len(asked)} questions that have none in the "
                "data, found no usable one; take a teacher that knows the task, or set finetune_teacher.enabled to "
                "true, or data.unanswered to refuse"
            )
    numbers = {record.id: number for number, record in enumerate(asked)}
    return TeacherAnswers(texts, numbers, shards, settings.kind == "hidden")
