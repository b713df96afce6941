"""Answers and truths of any Unicode: what holds of every metric, whatever is said."""

import string
import unicodedata

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from firstsight.evaluation.metrics import (
    agreement,
    bleu,
    bleu_order,
    bleu_statistics,
    exact_match,
    parse_option,
    score,
    squad_exact_match,
    squad_f1,
    token_f1,
)
from firstsight.evaluation.quality import summarise
from firstsight.records.sample import LETTERS, Record

pytestmark = pytest.mark.slow

# Digits and marks; every kind of character that Unicode has, halves of surrogate pairs too; words of scripts in which
# characters change their neighbours.
MARKS = " aAbBcC\t\u00a0−–—’“”…½²₂°€£٫٬٪。、，．।؟\u00ad\u200b\u200c\u200d"
WORDS = "the|an |cup|3.5|-5|1/2|1,000|10:30|C++|.NET|क्षि|كتاب‌ها|ན་|ကား|น้ำ|한글|ガス|红色|👨‍👩‍👧|🇩🇪|ẛ̣|İ|ß"
RARE = ["Cs", "Cf", "Cn", "Co", "Mn", "Mc", "Me", "No", "Nl", "Sk", "Pi", "Pf"]
PIECES = st.one_of(
    st.sampled_from(string.digits + string.punctuation + MARKS),
    st.characters(),
    st.characters(categories=RARE),
    st.sampled_from(WORDS.split("|")),
)
TEXTS = st.lists(PIECES, max_size=8).map("".join)
# However slow the machine is.
MANY = settings(max_examples=700, suppress_health_check=[HealthCheck.too_slow])
FEW = settings(MANY, max_examples=25)


def record(*answers, options=()):
    return Record("r", "What?", answers[0], answers, "open", options)


@MANY
@given(TEXTS, TEXTS)
@example("", "")
@example("A", "the")
def test_a_truth_is_right_nothing_is_wrong_and_which_is_which_does_not_matter(one, other):
    for text in (one, other):
        itself = score(record(text), text)
        whole = 1 if text.strip() else 0
        assert (itself.exact_match, itself.f1, itself.rouge_l) == (whole, whole, whole)
        for nothing in ("", " ", "\n\u00a0"):
            assert exact_match(nothing, [text]) == exact_match(text, [nothing]) == token_f1(nothing, [text]) == 0
        for form in ("NFC", "NFD"):
            assert exact_match(unicodedata.normalize(form, text), [text]) == whole
    assert exact_match(one, [other]) == exact_match(other, [one]) <= exact_match(one, [other, one])
    assert token_f1(one, [other]) == pytest.approx(token_f1(other, [one]))
    assert agreement(record(""), one, other) == agreement(record(""), other, one)
    assert exact_match(one, [other]) <= token_f1(one, [other])
    for metric in (exact_match, token_f1, squad_exact_match, squad_f1):
        assert 0 <= metric(one, [other]) <= 1
    assert 0 <= score(record(other), one).rouge_l <= 1


@MANY
@given(st.lists(TEXTS.filter(str.strip), min_size=2, max_size=6), TEXTS)
def test_a_letter_or_the_text_of_an_option_chooses_it_and_nothing_chooses_nothing(texts, answer):
    options = tuple({unicodedata.normalize("NFC", text).strip(): text for text in texts}.values())
    assume(len(options) > 1)
    letters = LETTERS[: len(options)]
    for letter, option in zip(letters, options, strict=True):
        assert parse_option(letter, options) == letter
        assert score(record(letter, options=options), letter).exact_match == 1
        if unicodedata.normalize("NFKC", option).strip() not in [*letters]:
            assert parse_option(option, options) == letter
    assert parse_option("", options) is None
    assert parse_option(" \n", options) is None
    assert parse_option(answer, options) in (None, *letters)
    assert agreement(record("A", options=options), answer, answer) == 1


@FEW
@given(st.lists(st.tuples(TEXTS, TEXTS.filter(str.strip)), min_size=1, max_size=6))
def test_figures_of_a_split_lie_between_nothing_and_all(pairs):
    predicted, records = [answer for answer, _ in pairs], [record(truth) for _, truth in pairs]
    order = bleu_order(records)
    assert 1 <= order <= 4
    counted = [bleu_statistics(*one, order) for one in zip(records, predicted, strict=True)]
    assert 0 <= bleu(np.sum(counted, axis=0)) <= 1
    summary = summarise(records, [str(n) for n in range(len(pairs))], predicted, 100, 0)
    for name in ("exact_match", "f1", "rouge_l", "bleu", "squad_exact_match", "squad_f1"):
        assert 0 <= summary[f"{name}_low"] <= summary[name] + 1e-9
        assert summary[name] <= summary[f"{name}_high"] + 1e-9 <= 1 + 1e-8
    right = summarise(records, ["g"] * len(pairs), [one.answer for one in records], 100, 0)
    assert (right["exact_match"], right["f1"], right["rouge_l"]) == pytest.approx((1, 1, 1))
