"""Sequence-level targets: questions that nobody has answered, answered by the teacher."""

from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from firstsight.core.errors import UserError
from firstsight.core.params import Targets
from firstsight.core.stage import log
from firstsight.distillation.targets import read_answers, write_answers
from firstsight.generation.answering import Question, answers
from firstsight.records.sample import LETTERS


def own_answers(
    model: PreTrainedModel | None,
    processor: ProcessorMixin,
    questions: list[Question],
    settings: Targets,
    kept: Path,
) -> dict[str, str]:
    """The teacher's answers to questions that have none, by record id (Kim and Rush, 2016, arXiv:1606.07947).

    One to options that is no letter of theirs comes out empty. They are kept in the folder `kept`, batch by batch, and
    those that are there already are not asked for again.
    """
    path = kept / "answers.json"
    try:
        found = read_answers(kept) if path.exists() else {}
    except UserError:
        log.warning("%s is damaged; asked again", path)
        found = {}
    rest = questions[len(found) :]
    asked = answers(model, processor, rest, settings.batch_size, settings.max_answer_tokens)
    progress = tqdm(asked, desc="cache-teacher-targets: answers", unit=" questions", total=len(rest), disable=not rest)
    for number, (text, (_, record)) in enumerate(zip(progress, rest, strict=True), start=1):
        fits = not record.options or text in LETTERS[: len(record.options)]
        found[record.id] = text if fits else ""
        if number % settings.batch_size == 0:
            write_answers(kept, found)
    write_answers(kept, found)
    if questions:
        useful = sum(map(bool, found.values()))
        log.info("the teacher answered %d of %d questions that have no answer", useful, len(questions))
    return found
