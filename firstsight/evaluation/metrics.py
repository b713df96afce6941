"""Answer metrics: exact match and token F1, ours and SQuAD's, ROUGE-L, BLEU, option accuracy, 95% intervals.

SQuAD's are those of Rajpurkar et al., 2016 (arXiv:1606.05250). Of several accepted answers, the best match counts.

To add a metric of single answers, add a field to `Scores` and compute it in `score`; for a corpus-level metric, add two
functions like `bleu_statistics` and `bleu`. Then summarise it in quality.py, whose docstring says how it reaches the
report; tests/test_metrics.py compares metrics with reference implementations.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import regex

from firstsight.core.words import fold, normalise, spaced, words
from firstsight.records.sample import LETTERS, Record, composed

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(predicted: str, accepted: Sequence[str]) -> float:
    """Return 1.0 if the prediction is one of the accepted answers, all as `normalise` returns them, else 0.0.

    An empty prediction matches nothing, not even an empty answer.
    """
    found = normalise(predicted)
    return float(found != "" and found in map(normalise, accepted))


def token_f1(predicted: str, accepted: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall over the words of `normalise`, the best over `accepted`."""
    return max(_f1(normalise(predicted).split(), normalise(answer).split()) for answer in accepted)


def squad_normalise(answer: str) -> str:
    """Apply SQuAD's normalisation: lower case, no ASCII punctuation, no English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def squad_exact_match(predicted: str, accepted: Sequence[str]) -> float:
    """Return SQuAD's exact match, 1.0 or 0.0: "3.5" is "35", "C++" is "C", and "" is "A"."""
    return float(squad_normalise(predicted) in map(squad_normalise, accepted))


def squad_f1(predicted: str, accepted: Sequence[str]) -> float:
    """Return SQuAD's token F1, the best over `accepted`; two answers of no words are equal."""
    pairs = [(squad_normalise(predicted).split(), squad_normalise(answer).split()) for answer in accepted]
    return max(_f1(found, truth) if found or truth else 1.0 for found, truth in pairs)


def _f1(predicted: list[str], truth: list[str]) -> float:
    if not predicted or not truth:
        return 0.0
    common = sum((Counter(predicted) & Counter(truth)).values())
    return 2 * common / (len(predicted) + len(truth))


# "B. text", "(B) text", "B: text", "B、text". Without a space, a point may be that of an abbreviation.
_MARKED = regex.compile(r"\p{Ps}?([A-Z])\s*(?:[.:。](?=\s|\P{ASCII})|、|\p{Pe})\s*(.+)", regex.DOTALL)
_UNMARKED = regex.compile(r"([A-Z])(?=\W)(.+)", regex.DOTALL)


def parse_option(predicted: str, options: Sequence[str]) -> str | None:
    """Return the letter of the option that an answer chooses, or None; an empty answer chooses nothing.

    The question asks for a letter, so a letter alone is one, whatever the options say. Next comes the text of one
    option and no other, as it stands or as `normalise` returns it; then a letter with a mark ("B. text"), unless the
    text is another option's; then a letter before its own option's text. "A person walks" chooses nothing: its A is an
    article.
    """
    letters, answer = LETTERS[: len(options)], unicodedata.normalize("NFKC", predicted).strip()
    if len(answer) == 1 and answer in letters:
        return answer
    if letter := _with_text(predicted, options, lambda text: composed(text.strip())):
        return letter
    if len(lone := "".join(words(predicted)).upper()) == 1 and lone in letters and lone in answer:
        return lone
    if letter := _with_text(predicted, options, fold) or _with_text(predicted, options, normalise):
        return letter
    if (match := _MARKED.fullmatch(answer)) and match[1] in letters:
        return match[1] if parse_option(match[2], options) in (None, match[1]) else None
    if (match := _UNMARKED.fullmatch(answer)) and match[1] in letters:
        return match[1] if exact_match(match[2], [options[letters.index(match[1])]]) else None
    return None


def _with_text(answer: str, options: Sequence[str], form: Callable[[str], str]) -> str | None:
    """Return the letter of the only option whose text is the answer's in a `form`; None if none or several are."""
    wanted = form(answer)
    found = [letter for letter, option in zip(LETTERS, options, strict=False) if wanted and form(option) == wanted]
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class Scores:
    """Hold the metrics of one answer; `unparsed` is 1.0 if the question has options and the answer chooses none."""

    exact_match: float
    f1: float
    rouge_l: float
    squad_exact_match: float
    squad_f1: float
    unparsed: float


class _Tokenizer:
    """Split text for rouge-score, whose own tokenizer knows ASCII letters and digits only."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@cache
def _rouge(*names: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # imported here: it imports all of nltk, and a report needs none

    return RougeScorer(names, tokenizer=_Tokenizer())


def rouge(predicted: str, truth: str) -> tuple[float, float, float]:
    """Return the F-measures ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004) over the words of `words`."""
    found = _rouge("rouge1", "rouge2", "rougeL").score(truth, predicted)
    return found["rouge1"].fmeasure, found["rouge2"].fmeasure, found["rougeL"].fmeasure


def is_right(record: Record, predicted: str) -> float:
    """Return 1.0 for a right answer, else 0.0: an exact match, or the right option if the question has options."""
    if record.options:
        return float(parse_option(predicted, record.options) in record.answers)
    return exact_match(predicted, record.answers)


def score(record: Record, predicted: str) -> Scores:
    """Score one answer. If the question has options, the chosen option is compared, and choosing none is wrong."""
    if record.options:
        right, unparsed = is_right(record, predicted), parse_option(predicted, record.options) is None
        return Scores(right, right, right, right, right, float(unparsed))
    accepted = record.answers
    return Scores(
        exact_match=exact_match(predicted, accepted),
        f1=token_f1(predicted, accepted),
        rouge_l=max(_rouge("rougeL").score(answer, predicted)["rougeL"].fmeasure for answer in accepted),
        squad_exact_match=squad_exact_match(predicted, accepted),
        squad_f1=squad_f1(predicted, accepted),
        unparsed=0.0,
    )


def agreement(record: Record, one: str, other: str) -> float:
    """Return 1.0 if two models say the same, right, wrong or nothing: the same option or normalised text; else 0.0."""
    chosen = [parse_option(answer, record.options) for answer in (one, other)] if record.options else [None]
    return float(chosen[0] == chosen[1] if all(chosen) else normalise(one) == normalise(other))


def bleu_order(records: Sequence[Record]) -> int:
    """Return the largest n-gram order that BLEU counts: the median number of words of the true answers, 1 to 4.

    Answers of one to three words have no 4-grams. The order must not depend on a model's answers, or models would be
    compared by different measures.
    """
    counts = sorted(len(spaced(record.answer).split()) for record in records)
    return max(1, min(4, counts[len(counts) // 2]))


def bleu_statistics(record: Record, predicted: str, order: int) -> list[int]:
    """Return an answer's statistics for corpus BLEU, [2 order + 2]: n-gram matches, n-gram totals, both lengths."""
    from sacrebleu.metrics import BLEU  # imported here: a report needs none

    scorer = BLEU(max_ngram_order=order, effective_order=True)
    found = scorer.sentence_score(spaced(predicted), [spaced(answer) for answer in record.answers])
    return [*found.counts, *found.totals, found.sys_len, found.ref_len]


def bleu(statistics: np.ndarray) -> float:
    """Return corpus BLEU (sacrebleu) in [0, 1] from the sum of `bleu_statistics`, [2 order + 2]."""
    from sacrebleu.metrics import BLEU  # as above

    order = (len(statistics) - 2) // 2
    matches, totals, (length, true_length) = np.split(statistics.astype(int), [order, 2 * order])
    found = BLEU.compute_bleu(
        list(matches), list(totals), int(length), int(true_length), smooth_method="exp", max_ngram_order=order
    )
    return min(1.0, found.score / 100)  # sacrebleu rounds up to 100.00000000000004


def proportion_interval(right: np.ndarray, groups: Sequence[str]) -> tuple[float, float]:
    """Return the 95% Wilson score interval (1927) of a mean of zeros and ones; it has a width at 0, 1 and small n too.

    Answers about the same image or video are correlated: the number of answers is divided by the design effect (Kish,
    1965), the ratio of the variance between `groups` to that of independent answers, where this is above 1.
    """
    count, share = len(right), right.mean()
    independent = share * (1 - share) / count
    if independent > 0:
        _, members = np.unique(groups, return_inverse=True)
        sums = np.bincount(members, weights=right - share)
        count /= max(1.0, float((sums**2).sum() / len(right) ** 2 / independent))
    z = 1.959964
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return float(min(share, middle - half)), float(max(share, middle + half))


def bootstrap_interval(
    values: np.ndarray,
    groups: Sequence[str],
    samples: int,
    seed: int,
    statistic: Callable[[np.ndarray], float] = np.mean,
) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of a statistic of the rows of `values`, [n, ...].

    Whole groups are resampled, `samples` times (Efron, 1979; Davison and Hinkley, 1997).
    """
    rng = np.random.default_rng(seed)
    _, members = np.unique(groups, return_inverse=True)
    order = np.argsort(members, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(members))[:-1])
    drawn = [
        statistic(values[np.concatenate([rows[one] for one in rng.integers(len(rows), size=len(rows))])])
        for _ in range(samples)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)
