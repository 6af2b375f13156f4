"""Key content: Rose et al.'s published example, word and phrase rules, levels, shortened texts."""

import sys

import pytest

from spo_kernels.data.key_content import (
    character_levels,
    extract_key_content,
    removal_level,
    shorten,
    smart_stop_words,
)

# Rose et al. 2010, figure 1.1
ABSTRACT = (
    "Compatibility of systems of linear constraints over the set of natural numbers. "
    "Criteria of compatibility of a system of linear Diophantine equations, strict inequations, "
    "and nonstrict inequations are considered. Upper bounds for components of a minimal set of "
    "solutions and algorithms of construction of minimal generating sets of solutions for all "
    "types of systems are given. These criteria and the corresponding algorithms for constructing "
    "a minimal supporting set of solutions can be used in solving all the considered types of "
    "systems and systems of mixed types."
)
# the paper generated its stop list from a corpus: it has five more of these words than SMART has
# and lacks one
MORE_STOP_WORDS = {"considered", "construction", "mixed", "solutions", "types"}
FEWER_STOP_WORDS = {"corresponding"}
PAPER_SCORES = {
    "minimal generating sets": 8.7,
    "linear diophantine equations": 8.5,
    "minimal supporting set": 7.7,
    "minimal set": 4.7,
    "linear constraints": 4.5,
    "natural numbers": 4.0,
    "strict inequations": 4.0,
    "nonstrict inequations": 4.0,
    "upper bounds": 4.0,
    "corresponding algorithms": 3.5,
    "set": 2.0,
    "algorithms": 1.5,
    "compatibility": 1.0,
    "systems": 1.0,
    "criteria": 1.0,
    "system": 1.0,
    "components": 1.0,
    "constructing": 1.0,
    "solving": 1.0,
}
STOP_WORDS = {"the", "of", "and", "is", "don't", "a"}


def phrases(text, stop_words=STOP_WORDS):
    return [found.phrase for found in extract_key_content(text, stop_words)]


def test_published_example():
    stop_words = (smart_stop_words() | MORE_STOP_WORDS) - FEWER_STOP_WORDS
    found = extract_key_content(ABSTRACT, stop_words)
    assert {one.phrase: round(one.score, 1) for one in found} == PAPER_SCORES
    best = min(found, key=lambda one: one.rank)
    assert best.phrase == "minimal generating sets" and best.rank == 0
    assert best.score == pytest.approx(8 / 3 + 3 + 3)
    for one in found:
        assert ABSTRACT[one.start : one.end].lower() == one.phrase
    starts = [one.start for one in found]
    assert starts == sorted(starts)
    # "systems" occurs four times, each with one rank
    systems = [one for one in found if one.phrase == "systems"]
    assert len(systems) == 4 and len({one.rank for one in systems}) == 1
    assert sorted({one.rank for one in found}) == list(range(len(PAPER_SCORES)))


def test_phrase_rules():
    # a newline ends a phrase, and so does punctuation
    assert phrases("red apple\ngreen pear, ripe plum") == ["red apple", "green pear", "ripe plum"]
    # a contraction is one word whatever its apostrophe, and a stop word as a whole
    assert phrases("Angela's dog don't bark") == ["angela's dog", "bark"]
    assert phrases("dog don\u2019t bark") == ["dog", "bark"]
    assert phrases("a state-of-the-art kernel") == ["state-of-the-art kernel"]
    # no word character, or nothing but numbers: no score, no phrase
    assert phrases("--- *** ... 2010 , 3.5 and ___") == []
    # a number belongs to its phrase but does not raise the score
    (found,) = extract_key_content("budget 2010", STOP_WORDS)
    assert (found.phrase, found.score) == ("budget 2010", 1.0)
    assert phrases("") == phrases("the of and") == []
    # positions count characters, not bytes
    (found,) = extract_key_content("the café", STOP_WORDS)
    assert (found.start, found.end) == (4, 8)
    # other languages bring their own stop words
    assert phrases("der rote Apfel", {"der"}) == ["rote apfel"]


def test_stop_words(monkeypatch):
    assert {"the", "don't", "you've"} <= smart_stop_words()
    with pytest.raises(ValueError, match=r"must be 'en', .* got 'de'\. Pass the stop words"):
        smart_stop_words("de")
    monkeypatch.setitem(sys.modules, "RAKE", None)
    with pytest.raises(ImportError, match=r"python-rake package\. Install spo-kernels\[trl\]"):
        smart_stop_words()


@pytest.mark.parametrize(
    ("num_phrases", "num_degrees", "levels"),
    [
        (1, 4, [1]),
        (2, 4, [1, 2]),
        (3, 4, [1, 2, 3]),
        (7, 4, [1, 1, 1, 2, 2, 3, 3]),
        (4, 2, [1, 1, 1, 1]),
        (5, 16, [1, 4, 7, 10, 13]),
    ],
)
def test_removal_level(num_phrases, num_degrees, levels):
    ranks = range(num_phrases)
    assert [removal_level(rank, num_phrases, num_degrees) for rank in ranks] == levels


def test_levels_and_views():
    text = "big red apple of the tree and apple"
    found = extract_key_content(text, STOP_WORDS)
    assert [(one.phrase, one.rank) for one in found] == [
        ("big red apple", 0),
        ("tree", 2),
        ("apple", 1),
    ]
    levels = character_levels(len(text), found, num_degrees=4)
    assert bytes(levels) == bytes([1] * 13 + [0] * 8 + [3] * 4 + [0] * 5 + [2] * 5)
    views = [shorten(text, levels, view) for view in range(4)]
    assert views == [text, "of the tree and apple", "of the tree and ", "of the and "]
    # the higher-ranked of two overlapping phrases wins
    shifted = [found[0], found[1]._replace(start=11)]
    assert set(character_levels(len(text), shifted, num_degrees=4)[:13]) == {1}
