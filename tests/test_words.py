"""What is the same answer, and what is another one: numbers, symbols, punctuation and words of many scripts."""

import unicodedata

import numpy as np
import pytest

from firstsight.core.words import words
from firstsight.evaluation.metrics import bleu, bleu_order, bleu_statistics, exact_match, score, squad_exact_match
from firstsight.records.sample import Record


def record(answer, *more):
    return Record("r", "What?", answer, (answer, *more), "open")


OTHER_NUMBERS = [
    ("35", "3.5"),
    ("5", "-5"),
    ("5", "−5"),
    ("5", "− 5"),
    ("0.5", "-.5"),
    ("12", "1/2"),
    ("12", "½"),
    ("1/2", "1 2"),
    ("11/2", "1½"),
    ("1030", "10:30"),
    ("169", "16:9"),
    ("1020", "10-20"),
    ("1020", "10–20"),
    ("53", "5 - 3"),
    ("10 20", "10-20"),
    ("20240102", "2024-01-02"),
    ("12/2024", "1/2/2024"),
    ("12.3", "1.2.3"),
    ("v12", "v1.2"),
    ("35", "3,5"),
    ("1234", "12,34"),
    ("0123", "0,123"),
    ("510", "5'10\""),
    ("510", "5′10″"),
    ("5", "5′"),
    ("102", "10²"),
    ("102", "10₂"),
    ("2n", "2ⁿ"),
    ("210", "2^10"),
    ("1e5", "1e-5"),
    ("12", "①②"),
    ("٣٥", "٣٫٥"),
    ("34", "3×4"),
    ("34", "3*4"),
    ("34", "3~4"),
]
OTHER_SYMBOLS = [
    ("C", "C++"),
    ("C", "C#"),
    ("C++", "C#"),
    ("NET", ".NET"),
    ("A", "A+"),
    ("A", "A-"),
    ("A+", "A-"),
    ("O+", "O−"),
    ("50", "50%"),
    ("50%", "50‰"),
    ("5", "$5"),
    ("€5", "$5"),
    ("$5", "-$5"),
    ("20", "20°"),
    ("20 C", "20 °C"),
    ("5", "<5"),
    ("5", "~5"),
    ("5", "±5"),
    ("1990", "1990-"),
    ("1", "#1"),
    ("RB", "R&B"),
    ("ab", "a@b"),
    ("ms", "m/s"),
    ("x5", "x=5"),
    ("x5", "x−5"),
    ("+", "-"),
    ("×", "÷"),
    ("!", "?"),
    ("👍", "👎"),
    ("👍🏽", "👍🏿"),
    ("👨👩👧", "👨‍👩‍👧"),
    ("🏴󠁧󠁢󠁥󠁮󠁧󠁿", "🏴󠁧󠁢󠁳󠁣󠁴󠁿"),
]
OTHER_WORDS = [
    ("vitamin", "vitamin A"),
    ("B", "A, B"),
    ("the", "A"),
    ("cafe", "café"),
    ("limon", "lımon"),
    ("कमल", "कमला"),
    ("علم", "عِلم"),
    ("نامهای", "نامه‌ای"),  # names of, and a letter: the joiner says which
    ("അവന്", "അവന്‍"),
]


@pytest.mark.parametrize(("answer", "truth"), OTHER_NUMBERS + OTHER_SYMBOLS + OTHER_WORDS)
def test_another_number_symbol_or_word_is_another_answer(answer, truth):
    for one, other in ((answer, truth), (truth, answer)):
        found = score(record(other), one)
        assert found.exact_match == 0
        assert found.f1 < 1
        assert found.rouge_l < 1
        assert score(record(other), other).exact_match == 1


SAME_NUMBERS = [
    ("-5", "−5"),
    ("-5", "–5"),
    ("-$5", "−$5"),
    ("-0.5", "-.5"),
    ("1/2", "½"),
    ("1 1/2", "1½"),
    ("1000", "1,000"),
    ("1000", "1'000"),
    ("1000", "1\u00a0000"),
    ("1234567.8", "1,234,567.8"),
    ("100000", "1,00,000"),
    ("10-20", "10–20"),
    ("10-20", "10 — 20"),
    ("16:9", "16 : 9"),
    ("3.14", "(3.14)."),
    ("10:30", "10:30."),
    ("42", "[42]!"),
    ("3.5", "٣٫٥"),
    ("50%", "50 %"),
    ("50%", "٥٠٪"),
    ("20 °C", "20℃"),
    ("3+4", "3 + 4"),
    ("x^2", "x²"),
    ("H2O", "H₂O"),
    ("１０：３０", "10:30"),
]
SAME_WORDS = [
    ("cup", "**cup**"),
    ("cup", "`cup`"),
    ("cup", "- cup"),
    ("cup", "• a cup;"),
    ("cup", "“A cup”…"),
    ("left hand", "left_hand"),
    ("cup, plate", "cup,plate"),
    ("cup - plate", "cup—plate"),
    ("don't", "don’t"),
    ("dont", "don´t"),
    ("T-shirt", "Tshirt"),
    ("cups", "cup(s)"),
    ("USA", "U.S.A."),
    ("ASP.NET", "asp.net"),
    ("C++", "(c++)."),
    ("A", "the A."),
    ("Straße", "STRASSE"),
    ("ΟΔΟΣ", "οδος"),
    ("İstanbul", "istanbul"),
    ("红色的杯子", "红色的杯子。"),
    ("红色杯子", "「红色」 杯子！"),
    ("コップ", "コップ、"),
    ("빨강, 파랑", "빨강,파랑."),
    ("लाल", "लाल।"),
    ("كتاب", "كتاب؟"),
    ("أحمر، أزرق", "أحمر،أزرق"),
    ("كتاب", "كـتاب"),
    ("နီ", "နီ။"),
    ("ቀይ", "ቀይ።"),
    ('צה"ל', "צה״ל"),
    ("cup", "cu\u00adp"),
    ("cup", "\u200fcup\u200e\ufeff"),
    ("cup", "cu\u200dp"),
    ("❤", "❤\ufe0f"),
]


@pytest.mark.parametrize(("answer", "truth"), SAME_NUMBERS + SAME_WORDS)
def test_the_same_answer_in_other_punctuation_or_spacing_is_right(answer, truth):
    for one, other in ((answer, truth), (truth, answer)):
        found = score(record(other), one)
        assert found.exact_match == found.f1 == 1
        assert exact_match("something else", [other]) == 0


def test_squads_exact_match_is_told_apart_by_its_name():
    for answer, truth in (("35", "3.5"), ("1030", "10:30"), ("C", "C++"), ("12", "1/2")):
        assert score(record(truth), answer).squad_exact_match == squad_exact_match(answer, [truth]) == 1


@pytest.mark.parametrize(
    ("answer", "truth", "f1"),
    [
        ("红色杯子", "红色的杯子", 8 / 9),  # characters
        ("蓝色的碗", "红色的杯子", 4 / 9),
        ("赤いコップ", "コップ", 3 / 4),
        ("แก้วแดง", "แก้ว", 6 / 9),
        ("ខ្មែរ", "ខ្មែ", 2 / 3),
        ("काला", "लाल", 0),  # words
        ("लाल कप", "लाल", 2 / 3),
        ("빨간 컵", "컵", 2 / 3),
        ("чашка", "красная чашка", 2 / 3),
        ("كوب", "كوب أحمر", 2 / 3),
        ("iPhone手机", "手机", 4 / 5),
        ("C", "C++", 0),
        ("5", "-5", 0),
        ("👍🏽 yes", "yes", 2 / 3),
    ],
)
def test_words_shared_are_counted_in_every_script(answer, truth, f1):
    found = score(record(truth), answer)
    assert found.f1 == pytest.approx(f1)
    assert found.rouge_l == pytest.approx(f1)


def test_a_character_keeps_its_marks():
    assert words("น้ำ กิน") == ["น้ํ", "า", "กิ", "น"]  # NFKC takes the vowel apart
    assert words("မြန်မာ") == ["မြ", "န်", "မာ"]
    assert words("ガラス ガ") == ["ガ", "ラ", "ス", "ガ"]
    assert words("क्षि 👨‍👩‍👧🇩🇪") == ["क्षि", "👨‍👩‍👧", "🇩🇪"]


FORMS = [
    "café",
    "Ångström",
    "한글",
    "tiếng Việt",
    "\u0958लम",
    "ড়",
    "ガス",
    "ﷺ",
    "ﬁsh",
    "ｃａｔ",
    "ｶﾞｽ",
    "ﻛﺘﺎﺏ",
    "Ω",
    "ẛ̣",
    "①",
]


@pytest.mark.parametrize("truth", FORMS)
def test_an_answer_is_right_in_every_normal_form(truth):
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        answer = unicodedata.normalize(form, truth)
        found = score(record(truth), answer)
        assert found.exact_match == found.f1 == found.rouge_l == score(record(answer), truth).exact_match == 1


def bleu_of(answer, truth):
    return bleu(np.array(bleu_statistics(record(truth), answer, 2)))


def test_bleu_counts_the_characters_of_scripts_without_spaces():
    assert bleu_of("红色的杯子。", "红色的杯子。") == pytest.approx(1)
    assert 0.4 < bleu_of("红色杯子", "红色的杯子") < 1
    assert bleu_of("लाल कप।", "लाल कप ।") == pytest.approx(1)
    assert bleu_of("don’t turn", "don't turn") == pytest.approx(1)
    assert bleu_order([record("红色的杯子")]) == 4
    assert bleu_order([record("two cups"), record("a"), record("red cups")]) == 2
