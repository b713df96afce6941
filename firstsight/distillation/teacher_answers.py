"""Generate the teacher's answers to questions that have none in the data: sequence-level distillation."""

from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from firstsight.core.errors import UserError
from firstsight.core.params import Targets
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
    generated = answers(model, processor, remaining, settings.batch_size, settings.max_answer_tokens)
    label = "cache-teacher-targets: answers"
    progress = tqdm(generated, desc=label, unit=" questions", total=len(remaining), disable=not remaining)
    for number, (text, (_, record)) in enumerate(zip(progress, remaining, strict=True), start=1):
        valid = not record.options or text in LETTERS[: len(record.options)]
        found[record.id] = text if valid else ""
        if number % settings.batch_size == 0:
            write_answers(folder, found)
    write_answers(folder, found)
    if questions:
        usable = sum(map(bool, found.values()))
        log.info("the teacher answered %d of %d questions that have no answer", usable, len(questions))
    return found
