"""Key content on tokens: the ids are TRL's for every kind of tokenizer, levels hit content only."""

import json

import pytest
from datasets import Dataset, IterableDataset
from trl import DPOConfig, DPOTrainer

from spo_kernels.data.key_content import character_levels, extract_key_content, smart_stop_words
from spo_kernels.integrations import SPOTrainer
from spo_kernels.integrations.spo import key_content_dataset
from spo_kernels.integrations.spo.key_content_dataset import (
    add_key_content,
    check_tokenizer,
    map_key_content,
)
from tests.helpers.trl_tiny import (
    Tiny,
    arguments,
    made_pairs,
    make_tokenizer,
    texts_of,
)

K = 4
KINDS = ("byte", "metaspace", "unigram")


def tokenized_by_trl(rows, tokenizer) -> Dataset:
    """Run TRL's own preparation, without building a trainer."""

    class Preparation(DPOTrainer):
        def __init__(self):
            self._tokenizer = tokenizer

    config = DPOConfig(output_dir="unused", max_length=None, use_cpu=True, bf16=False)
    return Preparation()._prepare_dataset(Dataset.from_list(rows), tokenizer, config, "test")


def columns_of(dataset, tokenizer, view="hidden", stop_words=None):
    words = smart_stop_words() if stop_words is None else stop_words
    return map_key_content(
        dataset, "test", tokenizer=tokenizer, num_degrees=K, view=view, stop_words=words
    )


@pytest.mark.parametrize("kind", KINDS)
def test_real_pairs(kind, real_pairs):
    """Ids equal TRL's (the mapping raises otherwise) and the marked characters are the phrases."""
    lines = real_pairs.read_text(encoding="utf-8").splitlines()[:40]
    rows = [json.loads(line) for line in lines]
    tokenizer = make_tokenizer(texts_of(rows), kind, vocab_size=1500)
    dataset = columns_of(tokenized_by_trl(rows, tokenizer), tokenizer)
    stop_words = smart_stop_words()
    share, empty, compared = [], 0, 0
    for row in dataset:
        for side in ("chosen", "rejected"):
            ids, levels = row[f"{side}_ids"], row[f"{side}_removal_levels"]
            assert len(ids) == len(levels)
            content = row[side][-1]["content"]
            phrases = extract_key_content(content, stop_words)
            marked = character_levels(len(content), phrases, K)
            assert set(levels) - {0} == set(marked) - {0}
            # the template's own tokens come last: end of turn and newline
            assert levels[-2:] == [0, 0]
            tokens = [i for i, level in zip(ids, levels, strict=True) if level]
            text = "".join(tokenizer.decode(tokens).split())
            wanted = "".join(content[p.start : p.end] for p in phrases)
            wanted = "".join(wanted.split())
            if "<unk>" not in text:
                # tokens that reach past a phrase, as in "word.", add characters but lose none
                left = iter(text)
                assert all(character in left for character in wanted)
                compared += 1
            share.append(sum(map(bool, levels)) / len(levels))
            empty += not any(levels)
    assert compared > 0.8 * len(share)
    assert 0.2 < sum(share) / len(share) < 0.6
    assert empty / len(share) < 0.15


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plain", [False, True], ids=["conversational", "plain"])
def test_levels_by_hand(kind, plain):
    phrase_rows = made_pairs(8, plain=plain)
    response = "The quick engine is by the lamp. The engine of the quick engine"
    answer = " " + response if plain else [{"role": "assistant", "content": response}]
    rows = [{**phrase_rows[0], "chosen": answer}, *phrase_rows[1:]]
    tokenizer = make_tokenizer(texts_of(rows), kind)
    tokenized = tokenized_by_trl(rows, tokenizer)
    row = columns_of(tokenized, tokenizer)[0]
    ids, levels = row["chosen_ids"], row["chosen_removal_levels"]
    by_level = [
        tokenizer.decode([i for i, x in zip(ids, levels, strict=True) if x == level]).split()
        for level in range(K)
    ]
    # ranks: quick engine, engine, lamp
    assert "".join(by_level[1]).replace(".", "") == "quickenginequickengine"
    assert "".join(by_level[2]) == "engine"
    assert "".join(by_level[3]).replace(".", "") == "lamp"
    views = columns_of(tokenized, tokenizer, view="text")[0]
    texts = [
        tokenizer.decode(row["prompt_ids"][:start] + ids).split("?" if plain else "assistant")[-1]
        for ids, start in zip(views["chosen_view_ids"], views["chosen_view_starts"], strict=True)
    ]
    # two of the tokenizers know no line end
    assert ["".join(text.replace("<unk>", "").split()) for text in texts] == [
        "Theisbythelamp.Theengineofthe<|end|>",
        "Theisbythelamp.Theofthe<|end|>",
        "Theisbythe.Theofthe<|end|>",
    ]


def test_templates(tmp_path):
    """Content is found where a template trims it, and in several assistant messages."""
    tiny = Tiny(tmp_path)
    messages = [
        {"role": "assistant", "content": "  The red lamp. \n\n The old bridge  "},
        {"role": "user", "content": "Where is the red lamp?"},
        {"role": "assistant", "content": "By the quiet river"},
    ]
    rows = [{**tiny.rows[0], "chosen": messages}]
    tokenizer = tiny.tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "(message['content'].split('\\n\\n')|map('trim')|join('\\n'))"
    )
    row = columns_of(tokenized_by_trl(rows, tokenizer), tokenizer)[0]
    marked = [i for i, x in zip(row["chosen_ids"], row["chosen_removal_levels"], strict=True) if x]
    text = tokenizer.decode(marked).replace(".", " ").replace("<|end|>", " ")
    # neither the user's "red lamp" nor the role names are content of the response
    assert text.split() == ["red", "lamp", "bridge", "quiet", "river"]


def test_template_text_is_no_content(tmp_path):
    """Words that a template writes before a response are not taken for the same words in it."""
    tiny = Tiny(tmp_path)
    tokenizer = tiny.tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']",
        "('red lamp seen: ' if message['role'] == 'assistant' else '') + message['content']",
    )
    rows = [{**tiny.rows[0], "chosen": [{"role": "assistant", "content": "red lamp"}]}]
    row = columns_of(tokenized_by_trl(rows, tokenizer), tokenizer)[0]
    levels = row["chosen_removal_levels"]
    before = tokenizer.decode(row["chosen_ids"][: next(i for i, x in enumerate(levels) if x)])
    assert before.strip() == "red lamp seen:"


def test_refused():
    class Slow:
        is_fast = False

    with pytest.raises(
        NotImplementedError, match="must be a fast tokenizer, got the slow Slow, wh"
    ):
        check_tokenizer(Slow())
    rows = made_pairs(4)
    tokenizer = make_tokenizer(texts_of(rows))
    tokenized = tokenized_by_trl(rows, tokenizer)
    other = make_tokenizer(texts_of(made_pairs(4, seed=1)), vocab_size=270)
    with pytest.raises(ValueError, match="gave other ids than TRL's"):
        columns_of(tokenized, other)
    parts = [{"type": "text", "text": "The red lamp"}]
    row = {**tokenized[0], "chosen": [{"role": "assistant", "content": parts}]}
    with pytest.raises(TypeError, match="content of a message must be text, got list"):
        add_key_content(row, tokenizer, K, "hidden", [], 1)


def test_cache_key(tmp_path, monkeypatch):
    """The same call is read from the cache; a new version of the extractor is not."""
    tiny = Tiny(tmp_path)
    tokenized = tokenized_by_trl(tiny.rows, tiny.tokenizer)
    first = columns_of(tokenized, tiny.tokenizer)
    shuffled = columns_of(tokenized, tiny.tokenizer, stop_words=list(smart_stop_words())[::-1])
    assert first._fingerprint == shuffled._fingerprint
    monkeypatch.setattr(key_content_dataset, "KEY_CONTENT_VERSION", 10**6)
    assert columns_of(tokenized, tiny.tokenizer)._fingerprint != first._fingerprint


@pytest.mark.parametrize("view", ["hidden", "text"])
def test_iterable_dataset(tmp_path, view):
    tiny = Tiny(tmp_path)
    tokenized = tokenized_by_trl(tiny.rows, tiny.tokenizer)
    streamed = IterableDataset.from_generator(lambda: iter(tokenized.to_list()))
    expected = columns_of(tokenized, tiny.tokenizer, view).to_list()
    assert list(columns_of(streamed, tiny.tokenizer, view)) == expected


def test_language(tmp_path):
    tiny = Tiny(tmp_path)
    settings = {"train_dataset": tiny.dataset, "processing_class": tiny.tokenizer}
    with pytest.raises(ValueError, match=r"language must be 'en', .* got 'de'"):
        args = arguments(tmp_path, key_content_language="de")
        SPOTrainer(model=tiny.path, args=args, **settings)
    args = arguments(tmp_path, key_content_language="de", key_content_stop_words=["the", "is"])
    trainer = SPOTrainer(model=tiny.path, args=args, **settings)
    assert any(map(any, trainer.train_dataset["chosen_removal_levels"]))
