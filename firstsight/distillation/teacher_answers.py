"""Generate the teacher's answers to questions that have none in the data: sequence-level distillation."""

from collections.abc import Iterator
from itertools import chain, groupby, islice
from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin

from firstsight.core.errors import UserError
from firstsight.core.params import Targets
from firstsight.core.progress import progress
from firstsight.core.stage import log
from firstsight.distillation.targets import read_answers, write_answers
from firstsight.generation.answering import Question, answers
from firstsight.records.sample import LETTERS


def generate_answers(
    model: PreTrainedModel | None,
    processor: ProcessorMixin,
    questions: list[Question],
    settings: Targets,
    folder: Path,
) -> dict[str, str]:
    """Answer the questions with the teacher; return its answers by record id (Kim and Rush, 2016, arXiv:1606.07947).

    To a question with options, an answer that is not one of their letters is replaced by "". Answers are written to
    `folder` after each batch; those already there are not generated again, and `model` may be None if all are.
    """
    path = folder / "answers.json"
    try:
        found = read_answers(folder) if path.exists() else {}
    except UserError:
        log.warning("%s is damaged; its answers are generated again", path)
        found = {}
    remaining = questions[len(found) :]
    label = "cache-teacher-targets: answers"
    with progress(desc=label, unit="questions", total=len(remaining)) as shown:
        for batch in _batches(remaining, settings.batch_size):
            given = answers(model, processor, batch, len(batch), settings.max_answer_tokens)
            for text, (_, record) in zip(given, batch, strict=True):
                valid = not record.options or text in LETTERS[: len(record.options)]
                found[record.id] = text if valid else ""
            write_answers(folder, found)
            shown.update(len(batch))
    write_answers(folder, found)
    if questions:
        usable = sum(map(bool, found.values()))
        log.info("the teacher answered %d of %d questions that have no answer", usable, len(questions))
        if not usable:
            raise UserError(
                f"models/teacher-finetuned: expected answers to the {len(questions)} questions that have none in the "
                "data, found no usable one; take a teacher that knows the task, or set finetune_teacher.enabled to "
                "true, or data.unanswered to refuse"
            )
    return found


def _batches(questions: list[Question], samples: int) -> Iterator[list[Question]]:
    """Yield the questions about so many samples at a time."""
    by_sample = (list(group) for _, group in groupby(questions, key=lambda question: question[0].id))
    while batch := list(chain.from_iterable(islice(by_sample, samples))):
        yield batch
