"""Recipes for scored preference pairs: reward goals in the prompt, a margin filter, a data mix.

They need ``datasets`` alone, no trainer: ``RewardAugmentation`` is for ``dataset.map``,
``ScoreMarginFilter`` for ``dataset.filter``. Both hold nothing but their settings, so ``datasets``
finds the same settings in its cache again and can send them to its workers.
"""

import bisect
import dataclasses
import math
import numbers
import string
from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets

from spo_kernels.integrations.data.preference_data import SIDES, kind_of

GOAL_TEMPLATE = (
    "Write a response whose quality score is {reward:g}. A higher score stands for a better "
    "response."
)
# made from the prompt and the responses as they were
STALE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps", "prompt_ids", "chosen_ids")


@dataclasses.dataclass(frozen=True)
class RewardAugmentation:
    """Make two rows of each scored pair, one for either response's score as the goal.

        goal = score of chosen:   the pair as it is
        goal = score of rejected: the pair swapped, for that goal the rejected response is better

    ``pairs.map(RewardAugmentation(), batched=True)`` gives rows 2i and 2i + 1 from row i. The goal
    goes into the prompt: as a system message, at the end of one that is there already, or in front
    of a prompt that is plain text. Rows without a column ``prompt`` hold it at the start of both
    responses, which then both get it. Every other column is kept; a swap exchanges each
    ``...chosen...`` column that has a ``...rejected...`` twin, so the score columns of a row still
    belong to its responses. Train with plain DPO. Pairs with equal scores give two rows that
    contradict each other: filter them out before. Columns computed from the old prompt (reference
    log-probs, token ids) are refused.

    Args:
        template: text of the goal, with ``{reward}`` or, say, ``{reward:.1f}``.
        system_role: False for models whose chat template has no system role: the goal then goes in
            front of the first user message.
        chosen_score, rejected_score: names of the score columns.
    Raises:
        ValueError: columns, rows, scores or template.
    Source: Zhang et al. 2024, arXiv:2410.08067. Differs from the authors' code by: without a system
        role the whole response is swapped too, not its first message alone.
    """

    template: str = GOAL_TEMPLATE
    system_role: bool = True
    chosen_score: str = "score_chosen"
    rejected_score: str = "score_rejected"

    def __post_init__(self) -> None:
        if _fields(self.template) != {"reward"}:
            raise ValueError(
                "RewardAugmentation: template must be text with {reward} and no other field, got "
                f"{self.template!r}. Write a brace that is meant literally twice."
            )

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        """Return the rows of ``batch`` with their goals, two for each."""
        self._check_columns(batch)
        twins = {name: name.replace("chosen", "rejected") for name in batch if "chosen" in name}
        twins = {name: twin for name, twin in twins.items() if twin in batch}
        twins[self.chosen_score] = self.rejected_score
        twins |= {twin: name for name, twin in twins.items()}
        columns = {name: [] for name in batch}
        for number, values in enumerate(zip(*(batch[name] for name in columns), strict=True)):
            row = dict(zip(columns, values, strict=True))
            swapped = {name: row[twins.get(name, name)] for name in row}
            for version in (row, swapped):
                for name, value in self._with_goal(version, number).items():
                    columns[name].append(value)
        return columns

    def _check_columns(self, batch: Mapping[str, list]) -> None:
        scores = (self.chosen_score, self.rejected_score)
        _require_columns("RewardAugmentation", batch, SIDES)
        _require_columns("RewardAugmentation", batch, scores, "chosen_score and rejected_score")
        stale = [name for name in STALE_COLUMNS if name in batch]
        if stale:
            raise ValueError(
                f"RewardAugmentation: the dataset must have no column {stale[0]!r}, got one. "
                "A goal changes the prompt: remove the column and compute it again afterwards."
            )
        scores = batch[self.chosen_score]
        if isinstance(scores, str) or not isinstance(scores, Iterable):
            raise ValueError(
                "RewardAugmentation: dataset.map must be called with batched=True, got a single row"
            )

    def _with_goal(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        """Return ``row`` with the score of its chosen response as the goal."""
        where = f"row {number} of a batch"
        for name in (self.chosen_score, self.rejected_score):
            _check_score("RewardAugmentation", name, row[name], where)
        goal = self.template.format(reward=float(row[self.chosen_score]))
        holders = ("prompt",) if "prompt" in row else SIDES
        kinds = {name: kind_of(row[name]) for name in dict.fromkeys((*holders, *SIDES))}
        if len(set(kinds.values())) > 1 or None in kinds.values():
            got = ", ".join(f"{name}: {kind or 'neither'}" for name, kind in kinds.items())
            raise ValueError(
                f"RewardAugmentation: {where} must be all text or all lists of messages, got "
                f"{got}. Remove the column 'prompt' if chosen and rejected repeat it."
            )
        return {**row, **{name: self._put(goal, row[name], name, where) for name in holders}}

    def _put(self, goal: str, value: str | list, name: str, where: str) -> str | list:
        """Return the prompt that ``value`` is, or starts with, with the goal in it."""
        if isinstance(value, str):
            return _join(goal, value)
        wanted = "system" if self.system_role else "user"
        roles = [message["role"] for message in value]
        if not value or (wanted == "user" and wanted not in roles):
            kind = "one message" if self.system_role else "one user message"
            raise ValueError(f"RewardAugmentation: {where} must have at least {kind} in {name!r}")
        if not self.system_role:
            place = roles.index("user")
            message = {**value[place], "content": _join(goal, value[place]["content"])}
            return [*value[:place], message, *value[place + 1 :]]
        if roles[0] == "system":
            return [{**value[0], "content": _join(value[0]["content"], goal)}, *value[1:]]
        return [{"role": "system", "content": goal}, *value]


@dataclasses.dataclass(frozen=True)
class ScoreMarginFilter:
    """Keep a pair if its chosen score is at least ``threshold`` above its rejected score.

    ``pairs.filter(ScoreMarginFilter(0.5))``. The difference is signed: a pair whose scores
    contradict its labels is dropped at any threshold >= 0, where the paper's |difference| would
    keep it; where chosen is the better scored response, both are the same. A difference that
    misses the threshold by rounding alone (7.6 - 7.5 >= 0.1) is kept.

    Args:
        threshold: finite; the paper tries 0, 0.1, 0.5 and 1.
        chosen_score, rejected_score: names of the score columns.
    Raises:
        ValueError: columns, scores or threshold.
    Source: Tajwar et al. 2024, arXiv:2404.14367. Differs from it by: the sign.
    """

    threshold: float
    chosen_score: str = "score_chosen"
    rejected_score: str = "score_rejected"

    def __post_init__(self) -> None:
        if not _is_number(self.threshold) or not math.isfinite(self.threshold):
            raise ValueError(
                f"ScoreMarginFilter: threshold must be a finite number, got {self.threshold!r}"
            )

    def __call__(self, row: Mapping[str, Any]) -> bool:
        """Whether ``row`` is kept."""
        names = (self.chosen_score, self.rejected_score)
        _require_columns("ScoreMarginFilter", row, names, "chosen_score and rejected_score")
        for name in names:
            _check_score("ScoreMarginFilter", name, row[name], "every row")
        chosen, rejected = (float(row[name]) for name in names)
        rounding = 1e-6 * max(1.0, abs(chosen), abs(rejected))
        return chosen - rejected >= self.threshold - rounding


def mix_on_policy(
    on_policy: Dataset | IterableDataset,
    off_policy: Dataset | IterableDataset,
    *,
    on_policy_ratio: float,
    num_rows: int | None = None,
    seed: int = 0,
) -> Dataset | IterableDataset:
    """Mix two datasets of pairs so that ``on_policy_ratio`` of the rows are on-policy.

    Two ``Dataset``: exactly round(on_policy_ratio * num_rows) rows of ``on_policy`` and the rest of
    ``off_policy``, drawn without replacement and shuffled. Two streams: each row comes from
    ``on_policy`` with that probability, so the counts are right on average only; each stream keeps
    its own order, and the mix ends where the first of them does. The same seed gives the same rows.

    Args:
        on_policy, off_policy: two ``Dataset`` or two ``IterableDataset`` with the same columns.
        on_policy_ratio: from 0 to 1; the paper tries 0, 0.5, 0.7 and 0.9.
        num_rows: rows of the mix; None is as many as both datasets allow. Give the same number at
            every ratio to compare ratios.
        seed: >= 0.
    Raises:
        ValueError: range, an empty dataset, columns or too few rows.
        TypeError: not two datasets.
    Source: Tajwar et al. 2024, arXiv:2404.14367.
    """
    if not _is_number(on_policy_ratio) or not 0.0 <= on_policy_ratio <= 1.0:
        raise ValueError(
            f"mix_on_policy: on_policy_ratio must be a number from 0 to 1, got {on_policy_ratio!r}"
        )
    for name, value, low in (("num_rows", num_rows, 1), ("seed", seed, 0)):
        is_absent = name == "num_rows" and value is None
        if not is_absent and not (_is_number(value, numbers.Integral) and value >= low):
            raise ValueError(f"mix_on_policy: {name} must be an integer >= {low}, got {value!r}")
    sources = {"on_policy": on_policy, "off_policy": off_policy}
    _check_sources(sources)
    if isinstance(on_policy, IterableDataset):
        if on_policy_ratio in (0.0, 1.0):
            mixed = on_policy if on_policy_ratio else off_policy
        else:
            shares = [on_policy_ratio, 1.0 - on_policy_ratio]
            mixed = interleave_datasets(list(sources.values()), probabilities=shares, seed=seed)
        return mixed if num_rows is None else mixed.take(num_rows)

    def counts(total: int) -> tuple[int, int]:
        share = round(on_policy_ratio * total)
        return share, total - share

    def is_too_many(total: int) -> bool:
        return counts(total)[0] > len(on_policy) or counts(total)[1] > len(off_policy)

    totals = range(len(on_policy) + len(off_policy) + 1)
    most = bisect.bisect_left(totals, True, key=is_too_many) - 1
    if num_rows is not None and num_rows > most:
        raise ValueError(
            f"mix_on_policy: num_rows must be at most {most} with on_policy_ratio="
            f"{on_policy_ratio}, {len(on_policy)} rows on-policy and {len(off_policy)} off-policy, "
            f"got {num_rows}"
        )
    # two seeds: the same one would draw the same places of two datasets of one length
    draws = zip(sources.values(), counts(num_rows or most), (seed, seed + 1), strict=True)
    parts = [dataset.shuffle(seed=draw).select(range(count)) for dataset, count, draw in draws]
    return concatenate_datasets(parts).shuffle(seed=seed)


def _check_sources(sources: dict[str, Dataset | IterableDataset]) -> None:
    """Refuse what cannot be mixed: other types, one of each, no rows, different columns."""
    columns = {}
    for name, dataset in sources.items():
        if not isinstance(dataset, Dataset | IterableDataset):
            got = type(dataset).__name__
            raise TypeError(f"mix_on_policy: {name} must be one split of a dataset, got {got}")
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError(f"mix_on_policy: {name} must have at least one row, got none")
        columns[name] = sorted(first)
    on_policy, off_policy = sources.values()
    if isinstance(on_policy, IterableDataset) != isinstance(off_policy, IterableDataset):
        kinds = [type(dataset).__name__ for dataset in sources.values()]
        raise TypeError(
            f"mix_on_policy: off_policy must be a {kinds[0]} like on_policy, got {kinds[1]}. "
            "dataset.to_iterable_dataset() makes a stream."
        )
    if columns["on_policy"] != columns["off_policy"]:
        raise ValueError(
            f"mix_on_policy: off_policy must have the columns {columns['on_policy']} of on_policy, "
            f"got {columns['off_policy']}"
        )


def _require_columns(
    recipe: str, columns: Mapping[str, Any], names: tuple[str, ...], settings: str = ""
) -> None:
    missing = [name for name in names if name not in columns]
    if missing:
        way_out = f". {settings} name the score columns." if settings else ""
        raise ValueError(
            f"{recipe}: the dataset must have a column {missing[0]!r}, got {sorted(columns)}"
            f"{way_out}"
        )


def _check_score(recipe: str, name: str, value: Any, where: str) -> None:
    """Refuse what is no finite number; the text says which kind of thing it is, not the value."""
    if not _is_number(value) or not math.isfinite(value):
        got = "NaN or infinity" if _is_number(value) else type(value).__name__
        raise ValueError(f"{recipe}: {name!r} must be a finite number in {where}, got {got}")


def _is_number(value: Any, kind: type = numbers.Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _fields(template: Any) -> set[str]:
    """Return the names of a template's fields; empty if it is no template for one number."""
    if not isinstance(template, str):
        return set()
    try:
        template.format(reward=1.0)
        return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except (AttributeError, IndexError, KeyError, ValueError):
        return set()


def _join(first: str | None, second: str | None) -> str:
    return "\n\n".join(part for part in (first, second) if part)
