"""Adds removal levels, or shortened responses, to a preference dataset that TRL has tokenized.

The chat template is rendered once per side and tokenized once with character offsets; the response
is sliced where TRL's own tokenization starts it. Decoding ids and tokenizing again would only give
the same ids with byte-level BPE. The sides of a row are its responses: a pair or one completion.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length, is_conversational

from spo_kernels import (
    KEY_CONTENT_VERSION,
    character_levels,
    extract_key_content,
    shorten,
)

PAIR = ("chosen", "rejected")

# stands for a content that no one writes
_MARK = "\ue000\ue001"
# a line without the spaces around it
_LINE = re.compile(r"\S(?:[^\n]*\S)?")

_LEVEL_COLUMNS = {"removal_levels": List(Value("int8"))}
_VIEW_COLUMNS = {"view_ids": List(List(Value("int32"))), "view_starts": List(Value("int32"))}


def key_content_columns(view: str, sides: Sequence[str] = PAIR) -> dict[str, Any]:
    """Return the columns that ``add_key_content`` adds, with their types."""
    columns = _LEVEL_COLUMNS if view == "hidden" else _VIEW_COLUMNS
    return {f"{side}_{name}": kind for side in sides for name, kind in columns.items()}


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot say where its tokens come from."""
    if not tokenizer.is_fast:
        raise NotImplementedError(
            "SPO trainer: processing_class must be a fast tokenizer, got the slow "
            f"{type(tokenizer).__name__}, which gives no character offsets. Use its fast version."
        )


def map_key_content(
    dataset: Dataset | IterableDataset,
    name: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    num_degrees: int,
    view: str,
    stop_words: Sequence[str],
    sides: Sequence[str] = PAIR,
    pair_length: int | None = None,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Return ``dataset`` with the columns of ``key_content_columns``, computed once and cached.

    With ``pair_length`` its sequences are those of CPO and ORPO: ``<side>_prompt_ids`` for each
    side, a start and an end token around the text, the response cut where they are that long.
    """
    arguments = {
        "tokenizer": tokenizer,
        "num_degrees": num_degrees,
        "view": view,
        # sorted, since the cache key is a hash of the arguments
        "stop_words": sorted(stop_words),
        "sides": tuple(sides),
        "pair_length": pair_length,
        "version": KEY_CONTENT_VERSION,
    }
    if isinstance(dataset, IterableDataset):
        return dataset.map(add_key_content, fn_kwargs=arguments)
    return dataset.map(
        add_key_content,
        fn_kwargs=arguments,
        # without them the first rows would decide: lists that are empty there have no type
        features=Features({**dataset.features, **key_content_columns(view, sides)}),
        num_proc=num_proc,
        desc=f"Finding key content in {name} dataset",
    )


def add_key_content(
    example: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    num_degrees: int,
    view: str,
    stop_words: Sequence[str],
    version: int,
    sides: Sequence[str] = PAIR,
    pair_length: int | None = None,
) -> dict[str, Any]:
    """Return one example's new columns; ``version`` is there only to be part of cache keys."""
    columns = {}
    for side in sides:
        response = _Response.of(example, side, tokenizer, pair_length)
        prompt_ids = example[f"{side}_prompt_ids" if pair_length is not None else "prompt_ids"]
        text = response.text()
        offsets = _completion_offsets(response, text, prompt_ids, example[f"{side}_ids"])
        document = "\n".join(response.contents)
        phrases = extract_key_content(document, stop_words)
        levels = character_levels(len(document), phrases, num_degrees)
        if view == "hidden":
            columns[f"{side}_removal_levels"] = _token_levels(response, text, offsets, levels)
        else:
            views = [
                _view(response, levels, number, prompt_ids) for number in range(1, num_degrees)
            ]
            columns[f"{side}_view_ids"] = [ids for ids, _ in views]
            columns[f"{side}_view_starts"] = [start for _, start in views]
    return columns


class _Response(NamedTuple):
    """One side of an example and the way to text and tokens that TRL took with it."""

    tokenizer: PreTrainedTokenizerBase
    prompt: Any
    completion: Any
    template: dict[str, Any] | None  # None: plain text
    contents: list[str]
    pair_length: int | None = None

    @classmethod
    def of(
        cls,
        example: dict[str, Any],
        side: str,
        tokenizer: PreTrainedTokenizerBase,
        pair_length: int | None,
    ) -> "_Response":
        prompt, completion = example["prompt"], example[side]
        if not is_conversational({"prompt": prompt}):
            # the end-of-sequence token was added by TRL and is no content
            content = completion.removesuffix(tokenizer.eos_token)
            return cls(tokenizer, prompt, completion, None, [content], pair_length)
        tools = example.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        template = {"tools": tools, **example.get("chat_template_kwargs", {})}
        contents = [message["content"] for message in completion if _has_content(message)]
        return cls(tokenizer, prompt, completion, template, contents, pair_length)

    def text(self) -> str:
        """Return what TRL tokenized: prompt and response, rendered."""
        if self.template is None:
            return self.prompt + self.completion
        messages = self.prompt + self.completion
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **self.template)

    def tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and character offsets of ``text``."""
        # a chat template writes its special tokens itself
        special = self.template is None and self.pair_length is None
        encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        if self.pair_length is not None:
            start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            if start is not None and ids[:1] != [start]:
                ids, offsets = [start, *ids], [(0, 0), *offsets]
            if ids[-1:] != [end]:
                ids, offsets = [*ids, end], [*offsets, (len(text), len(text))]
        return ids, offsets

    def with_contents(self, contents: list[str]) -> "_Response":
        """Return the same response with other content, in the same frame of template text."""
        if self.template is None:
            tail = self.completion[len(self.contents[0]) :]
            return self._replace(completion=contents[0] + tail, contents=contents)
        new = iter(contents)
        completion = [
            {**message, "content": next(new)} if _has_content(message) else message
            for message in self.completion
        ]
        return self._replace(completion=completion, contents=contents)


def _has_content(message: dict[str, Any]) -> bool:
    if message["role"] != "assistant" or message.get("content") is None:
        return False
    if not isinstance(message["content"], str):
        raise TypeError(
            "SPO trainer: the content of a message must be text, "
            f"got {type(message['content']).__name__}"
        )
    return True


def _completion_offsets(
    response: _Response, text: str, prompt_ids: list[int], completion_ids: list[int]
) -> list[tuple[int, int]]:
    """Return the characters of each completion token; the ids have to be TRL's."""
    ids, offsets = response.tokens(text)
    start = len(prompt_ids)
    end = len(ids) if response.pair_length is None else start + len(completion_ids)
    if ids[:start] != prompt_ids or ids[start:end] != completion_ids:
        raise ValueError(
            "SPO trainer: tokenizing the rendered conversation gave other ids than TRL's "
            f"({len(ids)} tokens against {start} + {len(completion_ids)}). The chat template must "
            "render the same text each time and the dataset must be tokenized with this tokenizer. "
            "Delete the dataset cache, or fix the date in chat_template_kwargs if the template "
            "prints today's."
        )
    return offsets[start:end]


def _token_levels(
    response: _Response, text: str, offsets: list[tuple[int, int]], levels: bytearray
) -> list[int]:
    """Return the removal level of each completion token: the lowest of its characters' above 0."""
    text_levels = bytearray(len(text))
    if response.template is None:
        text_levels[len(response.prompt) : len(response.prompt) + len(levels)] = levels
    elif offsets:
        for place, piece, size in _content_places(response, text, offsets[0][0]):
            text_levels[place : place + size] = levels[piece : piece + size]
    return [min(filter(None, text_levels[start:end]), default=0) for start, end in offsets]


def _content_places(response: _Response, text: str, cursor: int) -> Iterator[tuple[int, int, int]]:
    """Yield (place in the text, place in the joined contents, size) of every piece of content.

    A template may strip a content or move its lines apart; what it rewrites has no key content.
    """
    # the template's own text before each content, so that no content is looked for inside it
    frame = response.with_contents([_MARK] * len(response.contents)).text().split(_MARK)
    base = 0
    for i, content in enumerate(response.contents):
        before = text.find(frame[i], 0 if i == 0 else cursor) if i < len(frame) - 1 else -1
        if before >= 0:
            cursor = max(cursor, before + len(frame[i]))
        pieces = [(0, content)]
        if text.find(content, cursor) < 0:
            pieces = [(line.start(), line.group()) for line in _LINE.finditer(content)]
        for start, piece in pieces:
            place = text.find(piece, cursor)
            if place >= 0:
                yield place, base + start, len(piece)
                cursor = place + len(piece)
        base += len(content) + 1


def _view(
    response: _Response, levels: bytearray, view: int, prompt_ids: list[int]
) -> tuple[list[int], int]:
    """Return the completion ids of a view and how many prompt ids precede them.

    The ids are [] where the view removes nothing more than the one before it or leaves no token.
    """
    if view not in levels:
        return [], len(prompt_ids)
    contents, base = [], 0
    for content in response.contents:
        contents.append(shorten(content, levels[base : base + len(content)], view))
        base += len(content) + 1
    ids, _ = response.tokens(response.with_contents(contents).text())
    start = common_prefix_length(prompt_ids, ids)
    end = None if response.pair_length is None else max(start, response.pair_length)
    return ids[start:end], start
