"""Batches preference pairs: padded ids and masks, segment offsets and removal levels for SPO.

Rows are ``[chosen..., rejected...]``, S = 2P sequences of T tokens. Keys beside ``input_ids``,
``attention_mask``, ``completion_mask`` (all ``[S, T]``) and reference log-probs where given:

view="hidden"
    removal_levels   [S, T] int8: 0..K-1 in a response, -1 elsewhere
    segment_offsets  [S + 1] int64: response s = rows offsets[s]:offsets[s + 1] of the S * T tokens
    scored_rows      int: labels that are scored after the shift by one

view="text": E shortened responses, M = S + E sequences
    view_input_ids, view_attention_mask, view_completion_mask  [E, T]
    view_order       [M] int64: where in the S + E sequences the views of response 0, 1, ... are
    removal_levels   [M] int8: the level in view_order[m] that the next view lacks, 0 in the last
    segment_offsets  [S + 1] int64: response s = views offsets[s]:offsets[s + 1] of view_order
    scored_rows      int
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spo_kernels.calls.checks import check_choice, fail

_OP = "PreferenceCollator"


@dataclass(frozen=True)
class _Sequence:
    """One tokenized conversation; ``completion`` and ``levels`` run along ``ids``."""

    ids: list[int]
    completion: list[int]
    levels: list[int]

    def cut(self, span: slice) -> "_Sequence":
        return _Sequence(self.ids[span], self.completion[span], self.levels[span])


@dataclass
class PreferenceCollator:
    """Turn tokenized pairs into one padded batch.

    Each example holds ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and, per side, for
    view="hidden" ``<side>_removal_levels`` (one level a completion token), for view="text"
    ``<side>_view_ids`` (completion ids of views 1..K-1, [] where a view removes nothing more) and
    ``<side>_view_starts`` (how many prompt ids come before them). Optional: ``ref_chosen_logps``
    and ``ref_rejected_logps``; ``<side>_prompt_ids`` in place of ``prompt_ids``.

    Args:
        pad_token_id: fills ``input_ids`` on the right.
        view: "hidden" or "text".
        max_length: longer sequences are cut, or None.
        truncation_mode: "keep_start" or "keep_end", which part survives the cut.
        pad_to_multiple_of: pads T up to a multiple of it, or None.
        sides: the responses of an example; a batch holds all those of the first side first.
    """

    pad_token_id: int
    view: str = "hidden"
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    sides: tuple[str, ...] = ("chosen", "rejected")

    def __post_init__(self) -> None:
        check_choice(_OP, "view", self.view, ("hidden", "text"))
        check_choice(_OP, "truncation_mode", self.truncation_mode, ("keep_start", "keep_end"))

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rows = [(example, side) for side in self.sides for example in examples]
        originals = [self._original(example, side) for example, side in rows]
        views = [self._views(*row) if self.view == "text" else [] for row in rows]
        for original, shortened in zip(originals, views, strict=True):
            _drop_repeats(original, shortened)

        extra = [sequence for shortened in views for _, sequence in shortened]
        length = max(len(sequence.ids) for sequence in [*originals, *extra])
        if self.pad_to_multiple_of is not None:
            length += -length % self.pad_to_multiple_of
        batch = self._pad(originals, length, prefix="")
        # the first token of a sequence has nothing before it that could predict it
        batch["scored_rows"] = sum(sum(sequence.completion[1:]) for sequence in originals)
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples])
        if self.view == "hidden":
            batch["removal_levels"] = _padded([s.levels for s in originals], length, -1, torch.int8)
            batch["segment_offsets"] = torch.arange(len(originals) + 1) * length
        else:
            batch |= self._pad(extra, length, prefix="view_")
            batch |= _view_layout([[view for view, _ in shortened] for shortened in views])
        return batch

    def _original(self, example: dict[str, Any], side: str) -> _Sequence:
        completion = example[f"{side}_ids"]
        levels = [0] * len(completion)
        if self.view == "hidden":
            name = f"{side}_removal_levels"
            if name not in example:
                fail(_OP, name, "be a column of the examples", sorted(example))
            levels = example[name]
            if len(levels) != len(completion):
                fail(_OP, name, f"have {len(completion)} levels like {side}_ids", len(levels))
        return self._sequence(_prompt_of(example, side), completion, levels)

    def _views(self, example: dict[str, Any], side: str) -> list[tuple[int, _Sequence]]:
        name = f"{side}_view_ids"
        if name not in example:
            fail(_OP, name, "be a column of the examples", sorted(example))
        starts, prompt = example[f"{side}_view_starts"], _prompt_of(example, side)
        return [
            (view, self._sequence(prompt[:start], ids, [0] * len(ids)))
            for view, (ids, start) in enumerate(zip(example[name], starts, strict=True), start=1)
            if ids
        ]

    def _sequence(self, prompt: list[int], completion: list[int], levels: list[int]) -> _Sequence:
        whole = _Sequence(
            ids=prompt + completion,
            completion=[0] * len(prompt) + [1] * len(completion),
            levels=[-1] * len(prompt) + levels,
        )
        if self.max_length is None:
            return whole
        from_start = self.truncation_mode == "keep_start"
        return whole.cut(slice(self.max_length) if from_start else slice(-self.max_length, None))

    def _pad(self, sequences: list[_Sequence], length: int, *, prefix: str) -> dict[str, Any]:
        ones = [[1] * len(sequence.ids) for sequence in sequences]
        completion = [sequence.completion for sequence in sequences]
        ids = [sequence.ids for sequence in sequences]
        return {
            f"{prefix}input_ids": _padded(ids, length, self.pad_token_id, torch.int64),
            f"{prefix}attention_mask": _padded(ones, length, 0, torch.int64),
            f"{prefix}completion_mask": _padded(completion, length, 0, torch.int64),
        }


def _prompt_of(example: dict[str, Any], side: str) -> list[int]:
    name = f"{side}_prompt_ids"
    return example[name if name in example else "prompt_ids"]


def _drop_repeats(original: _Sequence, shortened: list[tuple[int, _Sequence]]) -> None:
    """Drop the views that equal the one before them, or have no response left, after the cut."""
    before = original
    for item in list(shortened):
        if item[1].ids == before.ids or not any(item[1].completion):
            shortened.remove(item)
        else:
            before = item[1]


def _view_layout(views: list[list[int]]) -> dict[str, torch.Tensor]:
    """Return where the views of each response are; ``views[s]`` lists those beside view 0."""
    order, levels, offsets = [], [], [0]
    next_extra = len(views)
    for response, extra in enumerate(views):
        order += [response, *range(next_extra, next_extra + len(extra))]
        levels += [*extra, 0]
        offsets.append(len(order))
        next_extra += len(extra)
    return {
        "view_order": torch.tensor(order, dtype=torch.int64),
        "removal_levels": torch.tensor(levels, dtype=torch.int8),
        "segment_offsets": torch.tensor(offsets, dtype=torch.int64),
    }


def _padded(rows: list[list[int]], length: int, value: int, dtype: torch.dtype) -> torch.Tensor:
    out = torch.full((len(rows), length), value, dtype=dtype)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=dtype)
    return out
