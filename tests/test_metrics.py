"""Answer metrics against hand-made cases and the properties they should have."""

import itertools

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from torchmetrics.functional.text import squad

from firstsight.evaluation.metrics import (
    Scores,
    agreement,
    bleu,
    bootstrap_interval,
    exact_match,
    parse_option,
    proportion_interval,
    score,
    squad_exact_match,
    squad_f1,
    token_f1,
)
from firstsight.evaluation.quality import summarise
from firstsight.records.sample import LETTERS, Record, Sample
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
        ("", ["red"], 0, 0),
        ("two", ["three", "two cups"], 0, 2 / 3),  # the best of several
        ("don't turn", ["Dont turn"], 1, 1),
    ],
)
def test_exact_match_and_f1_are_squads_where_words_are_compared(predicted, accepted, match, f1):
    assert exact_match(predicted, accepted) == squad_exact_match(predicted, accepted) == match
    assert token_f1(predicted, accepted) == squad_f1(predicted, accepted) == pytest.approx(f1)


@pytest.mark.parametrize("truth", ["A", "the", "An", "a the", "+", "-", "?!", "...", "(A)", "'", "_"])
def test_an_answer_of_articles_or_punctuation_is_itself_and_not_nothing(truth):
    """SQuAD's normalisation leaves nothing of it, so that an empty answer would be right."""
    for nothing in ("", " ", "\n\t"):
        assert squad_exact_match(nothing, [truth]) == 1
        assert exact_match(nothing, [truth]) == token_f1(nothing, [truth]) == 0
        assert exact_match(truth, [nothing]) == token_f1(truth, [nothing]) == 0
    assert exact_match(truth, [truth]) == token_f1(truth, [truth]) == 1
    assert exact_match("B", [truth]) == 0
    assert score(record(truth), "").exact_match == 0


def test_no_two_of_these_are_the_same_answer():
    for one, other in itertools.permutations(["", "A", "the", "An", "+", "-", "?", "!", "..."], 2):
        assert exact_match(one, [other]) == token_f1(one, [other]) == 0, (one, other)
    assert exact_match("", [""]) == token_f1("", [""]) == 0


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
        ("(b)", None),
        ("B)", "B"),
        ("“B”", "B"),
        ("**B**", "B"),
        ("（Ｂ）", "B"),
        ("B。", "B"),
        ("B、 a ball", "B"),
        ("(B) a ball.", "B"),
        ("B - a ball", "B"),
        ("B. It is round.", "B"),
        ("B. a cup", None),  # which?
        ("A, B", None),
        ("A) B)", None),
        ("AB", None),
        ("B+", None),
        ("B-", None),
        ("A.M.", None),
        ("Answer: B", None),
        ("The answer is B", None),
    ],
)
def test_options_are_parsed_strictly(answer, letter):
    assert parse_option(answer, ("a cup", "a ball", "nothing")) == letter


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        (
            ("1.5", "15", "0.15"),
            {"1.5": "A", "15": "B", "0.15": "C", ".15": "C", "1.5.": "A", "1,5": None},
        ),
        (("5", "-5", "1/2", "12"), {"5": "A", "−5": "B", "½": "C", "12": "D", "- 5": "A", "(-5)": "B"}),
        (("10:30", "1030", "10.30"), {"10:30": "A", "1030": "B", "10.30": "C", "10：30": "A"}),
        (("+", "times", "minus"), {"": None, " ": None, "+": "A", "+.": "A", "-": None, "Times": "B", "\u200b": None}),
        (("+", "-", "×", "÷"), {"-": "B", "−": "B", "–": "B", "÷": "D", "*": None, "": None}),
        (("E. coli", "C. elegans", "mouse"), {"C. elegans": "B", "C. Elegans.": "B", "C": "C", "C. mouse": "C"}),
        (("C", "C++", "C#", ".NET"), {"C++": "B", "c#": "C", "(C++)": "B", ".net": "D", "NET": None}),
        (("pH", "PH", "Ph"), {"pH": "A", "PH": "B", "ph": None, "B": "B"}),
        (("Yes!", "Yes?", "yes"), {"Yes!": "A", "YES?": "B", "yes.": None, "Yes": "C"}),
        (("red", "red cup", "a red"), {"red": "A", "Red cup.": "B", "A red": "C", "A. red": "A", "the red cup": "B"}),
        (("cup", "the cup"), {"cup": "A", "the cup": "B", "The cup!": None, "A cup": "A"}),
        (("caf\u00e9", "cafe"), {"cafe\u0301": "A", "CAFE": "B", "CAF\u00c9": "A"}),
        (("猫", "狗"), {"猫。": "A", "B、狗": "B", "B.狗": "B", "Ｂ：狗": "B", "（Ａ）猫": "A", "A、狗": None}),
        (("vitamin A", "vitamin B"), {"vitamin A": "A", "vitamin B.": "B", "vitamin": None}),
        # The question asks for a letter, and the truth is one.
        (("AB", "A", "B", "O"), {"B": "B", "(B)": "B", "C. B": None, "AB": "A", "O": "D"}),
    ],
)
def test_an_option_s_text_comes_before_a_letter_in_it_and_nothing_from_nothing(options, chosen):
    assert {answer: parse_option(answer, options) for answer in chosen} == chosen
    assert [parse_option(letter, options) for letter in LETTERS[: len(options)]] == list(LETTERS[: len(options)])


def test_an_unparsed_option_is_counted_and_wrong():
    chosen = record("B", options=("a cup", "a ball"))
    assert score(chosen, "(B) a ball").exact_match == 1
    assert score(chosen, "perhaps").unparsed == 1
    summary = summarise([chosen, chosen, record("two")], list("abc"), ["B", "perhaps", "two"], 100, 0)
    assert summary["option_accuracy"] == 0.5
    assert summary["options_unparsed"] == 1
    assert summary["exact_match"] == pytest.approx(2 / 3)
    assert summary["by_type"]["open"]["questions"] == 3


def test_squads_figures_stand_beside_ours():
    summary = summarise([record("A"), record("two")], ["a", "b"], ["", "two"], 100, 0)
    assert (summary["exact_match"], summary["squad_exact_match"]) == (0.5, 1)
    assert (summary["f1"], summary["squad_f1"]) == (0.5, 1)
    assert summary["squad_exact_match_low"] < 1 == summary["squad_f1_low"]


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


def test_squads_metrics_are_those_of_its_script():
    """torchmetrics' are a port of the official script."""
    for number, (predicted, accepted) in enumerate(CASES + FOREIGN):
        truth = {"id": str(number), "answers": {"answer_start": [0] * len(accepted), "text": accepted}}
        expected = squad([{"id": str(number), "prediction_text": predicted}], [truth])
        found = squad_exact_match(predicted, accepted), squad_f1(predicted, accepted)
        assert found == pytest.approx([float(expected[key]) / 100 for key in ("exact_match", "f1")]), predicted


def test_rouge_is_the_librarys_and_counts_other_scripts_too():
    library = RougeScorer(["rougeL"])
    for predicted, accepted in CASES:
        if "'" in predicted:
            continue  # two words to the library, one to ours and to SQuAD
        expected = max(library.score(answer, predicted)["rougeL"].fmeasure for answer in accepted)
        assert score(record(*accepted), predicted).rouge_l == pytest.approx(expected), predicted
    for predicted, accepted in FOREIGN:
        assert score(record(*accepted), predicted) == Scores(1, 1, 1, 1, 1, 0)
        assert score(record("👎"), predicted).rouge_l == 0


def test_bleu_is_the_librarys_over_every_accepted_answer():
    records = [record(*accepted) for _, accepted in CASES + FOREIGN]
    predicted = [text for text, _ in CASES + FOREIGN]
    most = max(len(one.answers) for one in records)
    references = [[one.answers[n] if n < len(one.answers) else None for one in records] for n in range(most)]
    # sacrebleu's tokenizer of Chinese, which splits everything else as its default does.
    expected = BLEU(max_ngram_order=2, tokenize="zh").corpus_score(predicted, references).score / 100
    # What has options has a letter for its truth, and no words.
    chosen = record("B", options=("a cup", "a ball"))
    summary = summarise([*records, chosen], [str(n // 2) for n in range(14)], [*predicted, "a ball"], 200, 0)
    assert summary["bleu_order"] == 2  # words that half of the true answers have
    assert summary["bleu"] == pytest.approx(expected)
    assert 0 < summary["bleu_low"] < expected < summary["bleu_high"] < 1
    assert "bleu" not in summarise([chosen], ["a"], ["B"], 100, 0)


def test_bleu_counts_all_models_by_the_same_n_grams():
    """sacrebleu's effective order is what a model's own answers are long enough for: longer wrong ones would lose."""
    records = [record("a cup"), record("red"), record("on the table")]
    right = bleu_of(records, ["a cup", "red", "on the table"])
    longer = bleu_of(records, ["a cup", "red", "on the table over there by the wall"])
    assert right == pytest.approx(1)
    assert 1 > longer > bleu_of(records, ["a cup", "blue", "no"]) > 0


def test_bleu_of_the_truth_is_one_and_no_more():
    assert bleu(np.array([8, 6, 4, 2, 8, 6, 4, 2, 8, 8])) == 1


def bleu_of(records, predicted):
    return summarise(records, ["a", "b", "c"], predicted, 100, 0)["bleu"]


def test_models_agree_on_an_option_however_they_name_it():
    chosen = record("B", options=("a cup", "a ball"))
    assert agreement(chosen, "B", "(B) a ball") == 1
    assert agreement(chosen, "A", "B") == 0
    assert agreement(chosen, "perhaps", "Perhaps.") == 1
    assert agreement(chosen, "perhaps", "B") == 0
    assert agreement(record("red"), "The blue", "blue") == 1


@pytest.mark.parametrize(("count", "truth"), [(120, 0.7), (77, 0.99), (62, 0.05), (10, 0.9), (5, 0.8)])
def test_intervals_of_shares_cover_the_truth_as_often_as_they_say(count, truth):
    rng, covered = np.random.default_rng(0), []
    for _ in range(600):
        low, high = proportion_interval((rng.random(count) < truth).astype(float), [str(n) for n in range(count)])
        assert 0 <= low < high <= 1
        covered.append(low <= truth <= high)
    assert 0.92 <= np.mean(covered) <= 0.995


def clustered(rng, groups=60, size=6):
    """Answers about the same media, right and wrong together: each group has a share of its own, 0.7 on average."""
    shares = np.repeat(rng.beta(1.4, 0.6, groups), size)
    return (rng.random(groups * size) < shares).astype(float), np.repeat(np.arange(groups), size)


def test_intervals_know_that_questions_share_their_media():
    rng, covered = np.random.default_rng(0), {"share": [], "bootstrap": [], "as if apart": []}
    for trial in range(200):
        right, groups = clustered(rng)
        alone = np.arange(len(right))
        for name, (low, high) in {
            "share": proportion_interval(right, groups),
            "bootstrap": bootstrap_interval(right, groups, 200, trial),
            "as if apart": proportion_interval(right, alone),
        }.items():
            covered[name].append(low <= 0.7 <= high)
    assert 0.9 <= np.mean(covered["share"]) <= 0.99
    assert 0.9 <= np.mean(covered["bootstrap"]) <= 0.99
    assert np.mean(covered["as if apart"]) < 0.85


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
