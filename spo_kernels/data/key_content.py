"""Key content of a response: RAKE phrases with their positions, and the removal level of each.

RAKE cuts a text into phrases at stop words, punctuation and line ends, scores a word by
degree / frequency and a phrase by the sum over its words.

    freq[w] = occurrences of w in phrases,  deg[w] = sum of the lengths of the phrases around them
    level of the phrase with rank r of R = 1 + floor(r (K - 1) / R)

Source: Rose et al. 2010, Automatic keyword extraction from individual documents. Differs from it
by: positions are returned, contractions and hyphenated words are one word, phrases are not rejoined
across stop words. The levels are this project's definition.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

# raise it whenever the spans, scores or levels of some text change: cached datasets depend on it
KEY_CONTENT_VERSION = 1

_WORD = re.compile(r"\w+(?:[-'\u2019]\w+)*")
_PHRASE_GAP = re.compile(r"[ \u00a0]+")


class KeyPhrase(NamedTuple):
    """One occurrence ``text[start:end]`` of a phrase; rank 0 is the highest score of the text."""

    start: int
    end: int
    phrase: str
    score: float
    rank: int


def smart_stop_words(language: str = "en") -> frozenset[str]:
    """Return the stop words for ``language``: python-rake's SMART list, the only one there is.

    Raises:
        ValueError: a language without a list.
        ImportError: python-rake is missing.
    """
    if language != "en":
        raise ValueError(
            f"key_content: language must be 'en', the only one with a stop list, got {language!r}. "
            "Pass the stop words of the language instead."
        )
    try:
        import RAKE
    except ImportError as error:
        raise ImportError(
            "key_content: the English stop list needs the python-rake package. "
            "Install spo-kernels[trl] or pass stop words."
        ) from error
    return frozenset(RAKE.SmartStopList())


def extract_key_content(text: str, stop_words: Collection[str]) -> list[KeyPhrase]:
    """Return every occurrence of every key phrase of ``text`` in text order.

    A phrase is a run of words without stop words, with nothing but spaces between them. Words
    without a letter score nothing, and phrases that score 0 are dropped. Equal scores rank by first
    appearance; every occurrence of a phrase has the phrase's rank.
    """
    stop_words = frozenset(map(_normal, stop_words))
    found = [
        (run[0].start(), run[-1].end(), tuple(_normal(word.group()) for word in run))
        for run in _runs(text, stop_words)
    ]
    frequency, degree = Counter(), Counter()
    for _, _, words in found:
        scoring = [word for word in words if _has_letter(word)]
        frequency.update(scoring)
        for word in scoring:
            degree[word] += len(scoring)
    scores = {
        words: sum(degree[word] / frequency[word] for word in words if word in frequency)
        for _, _, words in found
    }
    ranked = sorted((words for words in scores if scores[words] > 0), key=lambda w: -scores[w])
    rank_of = {words: rank for rank, words in enumerate(ranked)}
    return [
        KeyPhrase(start, end, " ".join(words), scores[words], rank_of[words])
        for start, end, words in found
        if words in rank_of
    ]


def removal_level(rank: int, num_phrases: int, num_degrees: int) -> int:
    """Return the level 1..K-1 of the phrase with this rank among ``num_phrases`` distinct ones."""
    return 1 + rank * (num_degrees - 1) // num_phrases


def character_levels(length: int, phrases: Sequence[KeyPhrase], num_degrees: int) -> bytearray:
    """Return the removal level of each of ``length`` characters, 0 outside the phrases.

    Where phrases overlap, the higher-ranked one wins.
    """
    num_phrases = len({phrase.rank for phrase in phrases})
    levels = bytearray(length)
    for phrase in sorted(phrases, key=lambda phrase: -phrase.rank):
        level = removal_level(phrase.rank, num_phrases, num_degrees)
        levels[phrase.start : phrase.end] = bytes([level]) * (phrase.end - phrase.start)
    return levels


def shorten(text: str, levels: Sequence[int], view: int) -> str:
    """Return view ``view`` of ``text``: without the characters of levels 1..view.

    Of the two spaces around a removed phrase one is removed with it.
    """
    kept: list[str] = []
    cut = False
    for character, level in zip(text, levels, strict=True):
        if 1 <= level <= view:
            cut = True
            continue
        doubled = character == " " and (not kept or kept[-1] in " \n")
        if not (cut and doubled):
            kept.append(character)
        cut = False
    return "".join(kept)


def _runs(text: str, stop_words: frozenset[str]) -> Iterator[list[re.Match[str]]]:
    """Yield the phrases of ``text`` as lists of words."""
    run: list[re.Match[str]] = []
    for word in _WORD.finditer(text):
        stops = _normal(word.group()) in stop_words
        joined = run and _PHRASE_GAP.fullmatch(text, run[-1].end(), word.start())
        if run and (stops or not joined):
            yield run
            run = []
        if not stops:
            run.append(word)
    if run:
        yield run


def _normal(word: str) -> str:
    return word.lower().replace("\u2019", "'")


def _has_letter(word: str) -> bool:
    return any(character.isalpha() for character in word)
