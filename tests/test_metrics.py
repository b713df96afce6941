"""Answer metrics against hand-made cases and the properties they should have."""

import numpy as np
import pytest

from firstsight.data.records import Record, Sample
from firstsight.evaluation.metrics import bleu, bootstrap_interval, exact_match, parse_option, score, token_f1
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


def test_bleu_of_the_truth_is_one_and_takes_any_accepted_answer():
    truths = ["a red cup lies on the table today", "keep walking straight on until the door"]
    records = [record("the cup is on the table", truths[0]), record(truths[1])]
    assert bleu(records, truths) == pytest.approx(1)
    assert bleu(records, ["nothing", "nothing"]) < 0.01


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
