"""Turn answers into the words that metrics compare, in any script. docs/evaluation.md says what is kept and what goes.

`regex` knows what Unicode says of each character, such as its script and whether it is a digit; `re` does not.
"""

import unicodedata

import regex

# What words are made of. Joiners without width are among them where they change a word or an emoji: see `_SILENT`.
_IN_WORD = r"[\p{L}\p{M}\p{N}\u200c\u200d]"
# Scripts without spaces between words: Chinese, Japanese, Thai, Lao, Khmer, Burmese and others.
_SPACELESS = (
    r"[[\p{scx=Han}\p{Ideographic}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Bopomofo}\p{Yi}\p{Line_Break=SA}]"
    r"&&[\p{L}\p{M}\p{N}]]"
)
# A character of these, with all its marks: Unicode's grapheme clusters leave out some of Burmese.
_CHARACTER = rf"(?={_SPACELESS})\X\p{{M}}*"


def _pattern(text: str) -> regex.Pattern:
    return regex.compile(text, regex.VERSION1 | regex.VERBOSE)


# Characters without width or meaning: soft hyphens, marks of direction, selectors of glyphs, control characters, and
# tatweel, which stretches a word. Group 1 has joiners with a meaning: at a virama, between joined letters, in an emoji.
_SILENT = _pattern(r"""
    ( (?<=\p{ccc=Virama}) [\u200c\u200d] | [\u200c\u200d] (?=\p{ccc=Virama})
    | (?<=\p{Joining_Type=Dual_Joining}\p{M}*) \u200c (?=[\p{Joining_Type=Dual_Joining}\p{Joining_Type=Right_Joining}])
    | (?<=[\p{Extended_Pictographic}\p{Emoji_Modifier}]) \u200d (?=\p{Extended_Pictographic})
    ) | [[\p{Default_Ignorable_Code_Point}\p{Cc}\u0640]--[\U000E0020-\U000E007F]]
""")
# Spaces that do not break group digits, as commas do.
_GROUPING_SPACE = _pattern(r"(?<=\p{Nd}) [\u00a0\u2009\u202f] (?=\p{Nd}{3}(?!\p{Nd}))")
# Where NFKC would join numbers.
_RAISED = _pattern(r"[⁺⁻]? [⁰¹²³⁴-⁹ⁿⁱ]+")
_NUMERAL = _pattern(r"(?<=\p{N}) (?<![⁰¹²³⁴-⁹₀-₉]) (?=\p{No})")
_DIGIT = _pattern(r"[\p{Nd}--[0-9]]")
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("‘’‛ʹʻʼ՚׳", "'"),
        **dict.fromkeys("‐‑‒–־", "-"),
        **dict.fromkeys("—―", " - "),
        **{"״": '"', "⁄": "/", "∕": "/", "٪": "%", "٫": ".", "٬": ",", "〜": "~"},
    }
)
# 10 - 20 is 10-20; a minus sign of another form is one where no letter precedes; 1,000 and 1'000 are 1000; .5 is 0.5.
_SPACED_SIGN = _pattern(r"(?<=[0-9]) [ ] ([-−/:~]) [ ] (?=[0-9])")
_MINUS = _pattern(rf"""
    (?<!{_IN_WORD}[ ]?) − [ ]? (?=[\p{{Sc}}.]?[0-9]) | (?<=[0-9]) − (?=[0-9]) | (?<={_IN_WORD}) − (?!{_IN_WORD}) | ^−$
""")
_THOUSANDS = _pattern(r"(?<![0-9.,']) [1-9][0-9]{0,2} ([,']) (?:[0-9]{2,3}\1)* [0-9]{3} (?![0-9,'])")
_BARE_POINT = _pattern(rf"(?<![.]|{_IN_WORD}) [.] (?=[0-9])")


def fold(text: str) -> str:
    """Return the text in the one form of all that read the same: case, width, composition, spaces, signs of numbers.

    It is NFKC with the case folded, but keeps numbers apart that NFKC would join: 10² is 10^2, 1½ is 1 1/2.
    """
    text = unicodedata.normalize("NFC", _GROUPING_SPACE.sub(",", text)).replace("´", "'")
    text = unicodedata.normalize("NFKC", _NUMERAL.sub(" ", _RAISED.sub(r"^\g<0>", text)))
    text = _SILENT.sub(r"\1", " ".join(text.split()))
    text = unicodedata.normalize("NFKC", text.casefold())
    text = text.replace("i\u0307", "i")  # the Turkish İ
    text = _DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0], digit[0])), text.translate(_SIGNS))
    text = _MINUS.sub("-", _SPACED_SIGN.sub(r"\1", " ".join(text.split())))
    return _THOUSANDS.sub(lambda number: number[0].replace(number[1], ""), _BARE_POINT.sub("0.", text))


# Marks that go from within a word, as by SQuAD: don't, T-shirt, U.S.A, cup(s). Between two digits they stay.
_JOINT = r"""['".\p{Pi}\p{Pf}\p{Ps}\p{Pe}-]"""
_JOINTS = _pattern(
    rf"(?<=[{_IN_WORD}--[0-9]]) (?<![0-9]e) {_JOINT} (?={_IN_WORD}) | (?<=[0-9]) {_JOINT} (?=[{_IN_WORD}--[0-9]])"
)
_WORDS = _pattern(rf"""
    (?: (?<!{_IN_WORD}) - (?=[0-9])                          # the sign of -5
      | (?<![.]|{_IN_WORD}) [.] (?=\p{{L}}) )?               # the point of .NET
    [{_IN_WORD}--{_SPACELESS}]+
    (?: (?: (?<=[0-9]) [.,:/'~*·_-]+ | (?<=[0-9]e) - ) [0-9] [{_IN_WORD}--{_SPACELESS}]* )*  # 3.5, 10:30, 1/2, 1e-5
    (?: [+\#]++ (?!{_IN_WORD}) | - (?!-|{_IN_WORD}) )?        # C++, C#, the grade A-
  | {_CHARACTER}
  | - (?=\p{{Sc}}[0-9]) | ~ (?=\p{{Sc}}?[0-9]) | \# (?={_IN_WORD}) | (?<=[0-9]) ′+
  | (?=[[\p{{S}}\p{{C}}%‰‱&@]--[`|~]]) \X                    # other symbols, and emoji
""")
_ARTICLES = _pattern(rf"(?<!{_IN_WORD}['.-]?) (?:an?|the) [ ] (?=[\p{{P}}\p{{Sc}}]*{_IN_WORD})")


def words(text: str) -> list[str]:
    """Return the words, numbers and symbols of a text, folded: all that `fold` leaves of it if there are none."""
    return _split(fold(text)) or text.split()


def normalise(answer: str) -> str:
    """Return the `words` of an answer without articles, one space between them; empty for an empty answer alone."""
    return " ".join(_split(_ARTICLES.sub("", fold(answer))) or answer.split())


def _split(folded: str) -> list[str]:
    return _WORDS.findall(_JOINTS.sub("", folded)) or folded.split()


_UNSPACED = _pattern(rf"{_CHARACTER} | [\p{{P}}--\p{{ASCII}}]")


def spaced(text: str) -> str:
    """Return the text with spaces around what sacrebleu's tokenizer does not split.

    These are the characters of scripts without spaces between words, and punctuation beyond ASCII.
    """
    return _UNSPACED.sub(r" \g<0> ", unicodedata.normalize("NFC", text).translate(_SIGNS))
