"""The batch of ``linear_preference_loss``: the rows of every role, checked and counted.

A role is chosen, rejected or third response; ``roles`` of them follow each other in a batch.
"""

from typing import NamedTuple

import torch

from spo_kernels.calls.checks import (
    FLOAT_DTYPES,
    check_dtype,
    check_same_device,
    check_shape,
    check_tensor,
    fail,
)
from spo_kernels.calls.preference_loss import LossOptions, Side
from spo_kernels.ops.linear_logprob_rows import read_counts


class PairBatch(NamedTuple):
    """Labels to score, and how many tokens every response of every pair has."""

    labels: torch.Tensor  # [B, T], those of the response merged into chosen's
    scored: torch.Tensor  # [B, T] bool: labels that are not ignored
    row_counts: torch.Tensor  # [roles, P] int64: rows scored of each role
    token_counts: torch.Tensor  # [responses, P] int64: tokens that count of each response
    pair_rows: list[tuple[int, ...]]  # row_counts on the host, one entry a pair
    pair_tokens: list[tuple[int, ...]]  # token_counts on the host


def count_batch(
    op: str,
    labels: torch.Tensor,
    response_labels: torch.Tensor | None,
    roles: int,
    ignore_index: int,
    vocab_size: int,
) -> PairBatch:
    """Count rows and tokens in the one host read of the call; refuses labels outside [0, V)."""
    P = labels.shape[0] // roles
    token_counts = (labels != ignore_index).sum(1).view(roles, P)
    given, labels = labels, merged_labels(labels, response_labels, ignore_index)
    scored = labels != ignore_index
    if response_labels is not None:
        given = torch.cat([given.long(), response_labels.long()])
        response_counts = (response_labels != ignore_index).sum(1)
        token_counts = torch.cat([token_counts, response_counts[None]])
    row_counts = scored.sum(1).view(roles, P)
    is_given = given != ignore_index
    counts = read_counts(op, [row_counts, token_counts], given, is_given, vocab_size)
    rows, tokens = counts[: roles * P], counts[roles * P :]
    pair_rows, pair_tokens = ([tuple(host[p::P]) for p in range(P)] for host in (rows, tokens))
    return PairBatch(labels, scored, row_counts, token_counts, pair_rows, pair_tokens)


def merged_labels(
    labels: torch.Tensor, response_labels: torch.Tensor | None, ignore_index: int
) -> torch.Tensor:
    """Return the labels to score: one scoring of the chosen rows serves both sets."""
    if response_labels is None:
        return labels
    chosen, rejected = labels.long().tensor_split([response_labels.shape[0]])
    return torch.cat([chosen.where(chosen != ignore_index, response_labels.long()), rejected])


def check_batch(
    op: str,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    ref_logps: torch.Tensor | None,
    response_labels: torch.Tensor | None,
    options: LossOptions,
) -> int:
    """Refuse a batch that is not chosen, rejected and third responses; return how many of these."""
    if hidden.dim() != 3:
        fail(op, "hidden", "have shape [B, T, H]", tuple(hidden.shape))
    readers = [row for row in options.losses if "response" in row.inputs]
    roles = 3 if readers and response_labels is None else 2
    B, T = labels.shape
    if B % roles:
        if roles == 2:
            fail(op, "hidden", "hold chosen and rejected rows, an even batch", f"B={B}")
        reason = f"for loss_type={readers[0].name!r}"
        fail(op, "hidden", f"hold chosen, rejected and third rows {reason}", f"B={B}")
    named = {"hidden": hidden}
    if ref_logps is not None:
        check_tensor(op, "ref_logps", ref_logps)
        check_dtype(op, "ref_logps", ref_logps, (*FLOAT_DTYPES, torch.float64))
        if tuple(ref_logps.shape) not in ((B,), (B, T)):
            fail(op, "ref_logps", f"have shape ({B},) or {(B, T)}", tuple(ref_logps.shape))
        named["ref_logps"] = ref_logps
    if response_labels is not None:
        check_tensor(op, "response_labels", response_labels)
        check_dtype(op, "response_labels", response_labels, (torch.int64, torch.int32))
        shape = (B // 2, T)
        check_shape(op, "response_labels", response_labels, shape, f"[P, T] {shape}")
        for row in readers:
            if row.mean_over != (2,):
                requirement = f"be None for loss_type={row.name!r}"
                way_out = "Its third response is a block of the batch."
                fail(op, "response_labels", requirement, "a tensor", way_out=way_out)
        named["response_labels"] = response_labels
    check_same_device(op, named)
    return roles


def sides_of(
    logps: torch.Tensor,
    scored: torch.Tensor,
    ref_logps: torch.Tensor | None,
    response_labels: torch.Tensor | None,
    roles: int,
    ignore_index: int,
) -> list[Side]:
    """Return chosen, rejected and third responses of ``[B, T]`` log-probs."""
    P = logps.shape[0] // roles
    slices = [slice(i * P, (i + 1) * P) for i in range(roles)]
    sides = [
        Side(logps[role], None if ref_logps is None else ref_logps[role], scored[role])
        for role in slices
    ]
    if response_labels is not None:
        sides.append(Side(logps[slices[0]], mask=response_labels != ignore_index))
    return [*sides, Side(None)][:3]
