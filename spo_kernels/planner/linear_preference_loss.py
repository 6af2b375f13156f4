"""The planner of ``linear_preference_loss``: log-probs of all pairs first, or pair by pair.

Beside the strategies of ``linear_logprob`` there is one that knows the loss. ``pairwise`` takes
groups of whole pairs whose exponentials fit the budget together: it scores a group, computes its
loss, and turns the exponentials into gradients at once. A pair that does not fit is streamed, a
span of one response at a time, with gradients that are scaled when the pair is complete. That is
three products whatever the number of rows; the price is a sum over the groups in fp32.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import torch

from spo_kernels.calls.checks import check_choice
from spo_kernels.calls.plan import GRAD_INPUTS, PAIR_STRATEGIES, Candidate, Plan
from spo_kernels.planner.linear_logprob import (
    allowed_strategies,
    check_budget,
    check_size,
    choose,
    default_budget_bytes,
    device_facts,
    forced_strategy,
    gemm_units,
    list_candidates,
    predicted_ms,
)
from spo_kernels.planner.models import Sizes, torch_candidates, triton_candidates

_OP = "plan_linear_preference_loss"
# a flush of the head's gradient a span: smaller spans never pay
_LEAST_SPAN_ROWS = 64
# index, labels, log-probs, lengths and masks of a row or a position
_ROW_BYTES, POSITION_BYTES = 128, 64


@dataclasses.dataclass(frozen=True)
class PairGroup:
    """Pairs ``first:stop``, scored together or, a single one, streamed span by span."""

    first: int
    stop: int
    streamed: bool


def pair_groups(pair_rows: Sequence[Sequence[int]], group_rows: int) -> list[PairGroup]:
    """Return consecutive pairs in groups of at most ``group_rows`` rows; longer ones streamed."""
    groups, first, held = [], 0, 0
    for pair, counts in enumerate(pair_rows):
        rows = sum(counts)
        if held + rows > group_rows:
            if first < pair:
                groups.append(PairGroup(first, pair, False))
            first, held = pair, 0
        if rows > group_rows:
            groups.append(PairGroup(pair, pair + 1, True))
            first = pair + 1
            continue
        held += rows
    if first < len(pair_rows):
        groups.append(PairGroup(first, len(pair_rows), False))
    return groups


def plan_linear_preference_loss(
    *,
    pair_rows: Sequence[Sequence[int]],
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    hidden_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    needs_grad: Iterable[str] = ("hidden", "weight"),
    lora_rank: int = 0,
    softcap: float | None = None,
    gathered: bool = True,
    head_copied: bool = False,
    positions: int | None = None,
    is_pairwise: bool = True,
    is_streamable: bool = True,
    is_margin: bool = True,
    budget_bytes: int | None = None,
    strategy: str = "auto",
    device: str = "cuda:sm_90",
) -> Plan:
    """Choose how ``linear_preference_loss`` runs.

        time = units * 2 N H V / flops + bytes moved / bandwidth

    Pure: nothing is allocated and no device is touched.

    Args:
        pair_rows: rows scored of each response, one sequence a pair: ``[(chosen, rejected), ...]``.
        hidden_size, vocab_size, dtype, hidden_dtype, weight_dtype, needs_grad, lora_rank, softcap,
            gathered, head_copied, device: as in ``plan_linear_logprob``.
        positions: B * T, scored or not; None is the number of rows.
        is_pairwise: whether the loss of a pair depends on this pair alone.
        is_streamable: whether the gradient is one number for each response.
        is_margin: whether that of rejected is minus that of chosen: one sum serves both.
        budget_bytes: > 0; default: as in ``plan_linear_logprob``, with 1 GiB (256 MiB on cpu) in
            place of its 256 MiB (64 MiB).
        strategy: "auto", "pairwise", or one of score, direction, resident, recompute.
    Returns:
        A ``Plan``; ``group_rows`` is the most rows whose exponentials live at one time.
    Raises:
        ValueError: a bad size, name or strategy; a budget nothing fits (names the smallest that
            works).
        NotImplementedError: a forced strategy that cannot run this loss.
    """
    for counts in pair_rows:
        for count in counts:
            check_size(_OP, "pair_rows", count, 0)
    check_size(_OP, "hidden_size", hidden_size, 1)
    check_size(_OP, "vocab_size", vocab_size, 1)
    check_size(_OP, "lora_rank", lora_rank, 0)
    needs = tuple(needs_grad)
    for name in needs:
        check_choice(_OP, "needs_grad", name, GRAD_INPUTS)
    check_choice(_OP, "strategy", strategy, ("auto", *PAIR_STRATEGIES))
    rows = sum(map(sum, pair_rows))
    sizes = Sizes(
        N=rows,
        H=hidden_size,
        V=vocab_size,
        R=lora_rank,
        dtype=dtype,
        hidden_dtype=hidden_dtype or dtype,
        weight_dtype=weight_dtype or dtype,
        needs=frozenset(needs),
        outputs=frozenset({"logps"}),
        capped=softcap is not None,
        gathered=gathered,
        head_strided=head_copied,
    )
    return plan_pairs(
        sizes,
        pair_rows,
        positions=rows if positions is None else positions,
        is_pairwise=is_pairwise,
        is_streamable=is_streamable,
        is_margin=is_margin,
        budget_bytes=budget_bytes,
        strategy=strategy,
        device=device,
    )


def plan_pairs(
    sizes: Sizes,
    pair_rows: Sequence[Sequence[int]],
    *,
    positions: int,
    is_pairwise: bool,
    is_streamable: bool,
    is_margin: bool,
    budget_bytes: int | None,
    strategy: str,
    device: str,
) -> Plan:
    """Choose how pairs of these sizes run; names and sizes have been checked."""
    slack = device_facts(device)[1].slack_bytes
    default = 3 * slack + default_budget_bytes(sizes, device)
    budget_bytes = check_budget(_OP, budget_bytes, default)
    # the batch's own vectors live beside every strategy
    aside = POSITION_BYTES * positions
    allowed = allowed_strategies(sizes.needs, sizes.capped, False)
    by_pair = []
    # a frozen head has two products whatever the rows: nothing to gain
    if pair_rows and is_pairwise and "direction" not in allowed and allowed != ("score",):
        by_pair = _pairwise_candidates(
            pair_rows, sizes, is_streamable, is_margin, budget_bytes - aside, device
        )
    if strategy == "pairwise" and not by_pair:
        why = "the head needs no gradient" if is_pairwise else "its loss couples the pairs"
        raise NotImplementedError(f"{_OP}: strategy='pairwise' cannot run this call: {why}.")
    if strategy not in ("auto", "pairwise"):
        allowed, by_pair = forced_strategy(_OP, strategy, allowed, sizes.needs), []
    found = by_pair
    if strategy != "pairwise":
        found = list_candidates(sizes, allowed, budget_bytes - aside, device) + by_pair
    found = [dataclasses.replace(c, peak_bytes=c.peak_bytes + aside) for c in found]
    return choose(_OP, found, sizes, budget_bytes, device)


def _pairwise_candidates(
    pair_rows: Sequence[Sequence[int]],
    sizes: Sizes,
    is_streamable: bool,
    is_margin: bool,
    budget_bytes: int,
    device: str,
) -> list[Candidate]:
    kind, facts = device_facts(device)
    model = torch_candidates if kind == "cpu" else triton_candidates
    units = gemm_units("resident", sizes.needs)
    acc = 8 if sizes.item == 8 else 4
    head = sizes.V * (
        sizes.H * ("weight" in sizes.needs)
        + sizes.R * ("lora_b" in sizes.needs)
        + ("bias" in sizes.needs)
    )
    row_grads = sizes.H * ("hidden" in sizes.needs) + sizes.R * ("lora_a" in sizes.needs)
    found = []
    for group_rows in _group_sizes(pair_rows, is_streamable):
        groups = pair_groups(pair_rows, group_rows)
        spans = [span for group in groups for span in span_rows(group, pair_rows, group_rows)]
        streamed = sum(group.streamed for group in groups)
        own = 1 if is_margin else max(map(len, pair_rows), default=0)
        buffers = own * (streamed > 0) + (len(groups) > streamed or streamed > 1)
        fixed = acc * (buffers * head + sizes.N * row_grads) + _ROW_BYTES * sizes.N
        largest = sizes._replace(N=max(spans, default=0), gathered=True, into=True)
        # the largest chunks that fit, or the smallest there are
        *_, chosen = model("resident", largest, budget_bytes - fixed)
        row_chunk, vocab_chunk, peak, moved = chosen
        # as if every span were the largest, then a read and a write of the sums each
        moved = moved * sizes.N // max(largest.N, 1) + 2 * acc * head * (
            len(spans) + streamed * own
        )
        time_ms = predicted_ms(facts, units, sizes, moved)
        found.append(
            Candidate(
                strategy="pairwise",
                row_chunk=row_chunk,
                vocab_chunk=vocab_chunk,
                gemm_units=units,
                bytes_moved=moved,
                peak_bytes=fixed + peak,
                time_ms=time_ms,
                group_rows=group_rows,
            )
        )
    return found


def span_rows(group: PairGroup, pair_rows: Sequence[Sequence[int]], group_rows: int) -> list[int]:
    """Return the rows of every span of a group; empty spans are left out."""
    counts = pair_rows[group.first : group.stop]
    if not group.streamed:
        return [sum(map(sum, counts))]
    return [
        min(group_rows, rows - start) for rows in counts[0] for start in range(0, rows, group_rows)
    ]


def _group_sizes(pair_rows: Sequence[Sequence[int]], is_streamable: bool) -> list[int]:
    """Return the group sizes to consider: all pairs, halves of that, and the longest pair."""
    longest, total = max(map(sum, pair_rows), default=0), sum(map(sum, pair_rows))
    least = _LEAST_SPAN_ROWS if is_streamable else max(longest, 1)
    sizes, size = {max(total, 1), max(longest, 1)}, total
    while size // 2 >= least:
        size //= 2
        sizes.add(size)
    return sorted(sizes, reverse=True)
