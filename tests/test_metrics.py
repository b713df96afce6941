"""Answer metrics against hand-made cases and the properties they should have."""

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu
from torchmetrics.functional.text import squad

from firstsight.data.records import Record, Sample
from firstsight.evaluation.metrics import (
    Scores,
    agreement,
    bootstrap_interval,
    exact_match,
    parse_option,
    score,
    token_f1,
)
from firstsight.evaluation.quality import summarise
from firstsight.reporting.summary import baselines


def record(answer, *more, options=()):
    return Record("r", "What?", answer, (answer, *more), "open", options)


@pytest.mark.parametrize(
    ("predicted", "accepted", "match", "f1"),
    [
        ("A red cup.", ["red cup"], 1, 1),
        ("The  RED cup", ["a red cup!"], 1, 1),
        ("red", ["red cup"], 0, 2 / 3),
        ("red red", ["red cup"], 0, 1 / 2),
        ("blue", ["red cup"], 0, 0),
        ("the", [""], 1, 1),  # nothing is left of either
        ("", ["red"], 0, 0),
        ("two", ["three", "two cups"], 0, 2 / 3),  # the best of several
        ("don't turn", ["Dont turn"], 1, 1),
    ],
)
def test_exact_match_and_f1_are_squads(predicted, accepted, match, f1):
    assert exact_match(predicted, accepted) == match
    assert token_f1(predicted, accepted) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B: a ball", "B"),
        ("a ball", "B"),
        ("A Ball.", "B"),
        ("B a ball", "B"),
        ("A person walks by", None),
        ("A", "A"),
        ("E", None),
        ("neither", None),
        ("", None),
        ("b", None),
    ],
)
def test_options_are_parsed_strictly(answer, letter):
    assert parse_option(answer, ("a cup", "a ball", "nothing")) == letter


def test_an_unparsed_option_is_counted_and_wrong():
    chosen = record("B", options=("a cup", "a ball"))
    assert score(chosen, "(B) a ball").exact_match == 1
    assert score(chosen, "perhaps").unparsed == 1
    summary = summarise([chosen, chosen, record("two")], ["B", "perhaps", "two"], 100, 0)
    assert summary["option_accuracy"] == 0.5
    assert summary["options_unparsed"] == 1
    assert summary["exact_match"] == pytest.approx(2 / 3)
    assert summary["by_type"]["open"]["questions"] == 3


# What a model says, and what is accepted: in words, in other scripts, in signs, and not at all.
CASES = [
    ("A red cup.", ["red cup"]),
    ("red red cup on the table today", ["the red cup on a table", "a cup"]),
    ("keep walking straight on until the door", ["walk on until you reach the door", "straight on"]),
    ("don't turn", ["Dont turn"]),
    ("two", ["three", "two cups"]),
    ("", ["red"]),
    ("the", ["a"]),
    ("left_hand", ["left hand"]),
    ("une tasse a cafe", ["a cafe cup"]),
]
FOREIGN = [("红色的杯子", ["红色的杯子"]), ("Красная чашка", ["красная чашка"]), ("👍", ["👍"]), ("café", ["café"])]


def test_exact_match_and_f1_are_those_of_the_squad_script():
    """torchmetrics' are a port of the official script."""
    for number, (predicted, accepted) in enumerate(CASES + FOREIGN):
        truth = {"id": str(number), "answers": {"answer_start": [0] * len(accepted), "text": accepted}}
        expected = squad([{"id": str(number), "prediction_text": predicted}], [truth])
        found = exact_match(predicted, accepted), token_f1(predicted, accepted)
        assert found == pytest.approx([float(expected[key]) / 100 for key in ("exact_match", "f1")]), predicted


def test_rouge_is_the_librarys_and_counts_other_scripts_too():
    library = RougeScorer(["rougeL"])
    for predicted, accepted in CASES:
        expected = max(library.score(answer, predicted)["rougeL"].fmeasure for answer in accepted)
        assert score(record(*accepted), predicted).rouge_l == pytest.approx(expected), predicted
    for predicted, accepted in FOREIGN:
        assert score(record(*accepted), predicted) == Scores(1, 1, 1, 0)
        assert score(record("👎"), predicted).rouge_l == 0


def test_bleu_is_the_librarys_over_every_accepted_answer():
    records = [record(*accepted) for _, accepted in CASES + FOREIGN]
    predicted = [text for text, _ in CASES + FOREIGN]
    most = max(len(one.answers) for one in records)
    references = [[one.answers[n] if n < len(one.answers) else None for one in records] for n in range(most)]
    expected = corpus_bleu(predicted, references, use_effective_order=True).score / 100
    summary = summarise(records, predicted, 200, 0)
    assert summary["bleu"] == pytest.approx(expected)
    assert 0 < summary["bleu_low"] < expected < summary["bleu_high"] < 1


def test_models_agree_on_an_option_however_they_name_it():
    chosen = record("B", options=("a cup", "a ball"))
    assert agreement(chosen, "B", "(B) a ball") == 1
    assert agreement(chosen, "A", "B") == 0
    assert agreement(chosen, "perhaps", "Perhaps.") == 1
    assert agreement(chosen, "perhaps", "B") == 0
    assert agreement(record("red"), "The blue", "blue") == 1


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = bootstrap_interval(rng.random(120) < 0.7, 300, trial)
        covered += low <= 0.7 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_baselines_guess_from_training_answers_alone():
    def sample(*asked):
        records = tuple(Record(f"{n}", text, answer, (answer,), kind) for n, (text, answer, kind) in enumerate(asked))
        return Sample("s", "g", "test", "none", (), 0.0, records)

    train = [
        sample(("Colour?", "red", "colour"), ("Colour?", "red", "colour"), ("Colour?", "blue", "colour")),
        sample(("Held?", "cup", "object"), ("Held?", "cup", "object"), ("Seen?", "cup", "object"), ("How?", "", "how")),
    ]
    test = sample(
        ("Colour?", "red", "colour"),  # its commonest answer
        ("Shade?", "red", "colour"),  # never asked: the commonest to its type
        ("Why?", "cup", "reason"),  # nor its type: the commonest of all
        ("Held?", "pan", "object"),
    )
    assert baselines(train, test.records) == {"majority-answer": 0.25, "question-only": 0.75}
