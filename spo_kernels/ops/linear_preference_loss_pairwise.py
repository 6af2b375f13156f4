"""Strategy ``pairwise`` of ``linear_preference_loss``: the loss of a group while its tiles live.

A group of whole pairs is scored as ``resident`` does it, its loss and the slope of every token
follow, and its exponentials become gradients at once. A streamed pair goes span by span with
slopes of 1, and its gradients are scaled when both responses are scored. Sums over groups have the
products' dtype; the head's gradient is cast once, in the backward.
"""

import dataclasses
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F

from spo_kernels.calls.linear_logprob import Call, Inputs, Kept, RowGrads, Rows
from spo_kernels.calls.preference_loss import LossOptions, PairData, Scored, Side
from spo_kernels.ops.linear_logprob_call import backend_of
from spo_kernels.ops.preference_loss import loss_backend_of
from spo_kernels.planner.linear_preference_loss import PairGroup

# rows of the head that are scaled and cast at once
_HEAD_STEP = 4096
ROW_INPUTS, _HEAD_INPUTS = ("hidden", "lora_a"), ("weight", "bias", "lora_b")


@dataclasses.dataclass(frozen=True)
class PairwiseCall:
    """Settings for scoring, pair grouping and the loss."""

    call: Call
    options: LossOptions
    loss_backend: str
    groups: tuple[PairGroup, ...]
    # host counts, one sequence a pair: rows scored of each role, and tokens that count of chosen,
    # rejected and, where there is one, the third response
    pair_rows: Sequence[Sequence[int]]
    pair_tokens: Sequence[Sequence[int]]


class PairTensors(NamedTuple):
    """Tensors that the loss reads beside the log-probs."""

    row_counts: torch.Tensor  # [roles, P] int64: pair_rows on the device
    token_counts: torch.Tensor  # [responses, P] int64: pair_tokens on the device
    ref_sums: torch.Tensor | None  # [roles, P]
    ref_rows: torch.Tensor | None  # [N], of the scored rows
    chosen_mask: torch.Tensor | None  # [N] bool: rows of chosen that count
    response_mask: torch.Tensor | None  # [N] bool: rows of chosen that count for the response
    data: PairData


class PairwiseResult(NamedTuple):
    """Outputs of the pairs, and the gradients of the mean loss."""

    losses: torch.Tensor  # [P]
    rewards: torch.Tensor  # [2, P]
    sums: torch.Tensor  # [2, P]
    rows: Rows  # in the order of the groups, like the rows of grads
    grads: dict[str, torch.Tensor]  # hidden, lora_a: [N, *]; the others whole


def pairwise_forward(
    pairwise: PairwiseCall, rows: Rows, inputs: Inputs, tensors: PairTensors
) -> PairwiseResult:
    """Score every group; return the losses with the gradients of their mean."""
    run = _Run(pairwise, rows, inputs, tensors)
    start = 0
    for group in pairwise.groups:
        roles = run.roles_of(group, start)
        if group.streamed:
            run.stream(group, roles)
        else:
            run.score(group, roles)
        start = roles[-1].stop
    return PairwiseResult(
        run.losses, run.rewards, run.sums, run.rows, run.row_grads | run.head_grads
    )


def scaled_gradient(
    kept: torch.Tensor,
    upstream: torch.Tensor,
    shape: torch.Size,
    dtype: torch.dtype,
    *,
    rows: Rows | None,
    row_chunk: int,
) -> torch.Tensor:
    """Return a kept gradient times ``upstream`` in its parameter's dtype, its rows in place."""
    if rows is None:
        out = torch.empty(shape, dtype=dtype, device=kept.device)
        # a product in another dtype has a whole temporary on a CPU
        for start in range(0, len(out), _HEAD_STEP):
            step = slice(start, start + _HEAD_STEP)
            out[step] = kept[step] * upstream
        return out
    out = torch.zeros(shape, dtype=dtype, device=kept.device)
    for start in range(0, rows.count, row_chunk):
        stop = min(start + row_chunk, rows.count)
        rows.put(out, start, stop, kept[start:stop] * upstream)
    return out


class _Run:
    """One forward: rows in the order of the groups, and the sums that the groups add to."""

    def __init__(
        self, pairwise: PairwiseCall, rows: Rows, inputs: Inputs, tensors: PairTensors
    ) -> None:
        self.pairwise, self.call = pairwise, pairwise.call
        self.backend = backend_of(self.call.settings.backend)
        self.loss_backend = loss_backend_of(pairwise.loss_backend)
        # first row of every response in batch order, [roles][P + 1]
        self.firsts, start = [], 0
        for counts in zip(*pairwise.pair_rows, strict=True):
            self.firsts.append(list(accumulate(counts, initial=start)))
            start = self.firsts[-1][-1]
        order = [
            slice(first[group.first], first[group.stop])
            for group in pairwise.groups
            for first in self.firsts
        ]
        self.rows = _reordered(rows, order, inputs.hidden.device)
        self.inputs = inputs._replace(labels=_gather(inputs.labels, order))
        self.tensors = tensors._replace(
            ref_rows=_gather(tensors.ref_rows, order),
            chosen_mask=_gather(tensors.chosen_mask, order),
            response_mask=_gather(tensors.response_mask, order),
        )
        self.offsets = F.pad(tensors.row_counts.cumsum(1), (1, 0))

        dtype = (
            torch.float64 if self.call.settings.compute_dtype == torch.float64 else torch.float32
        )
        P = len(pairwise.pair_rows)
        self.losses = torch.empty(P, dtype=dtype, device=inputs.hidden.device)
        self.rewards, self.sums = self.losses.new_empty(2, P), self.losses.new_empty(2, P)
        self.slope = self.losses.new_full((P,), 1.0 / P)
        self.row_grads = {
            name: self.losses.new_zeros(rows.count, getattr(inputs, name).shape[-1])
            for name in ROW_INPUTS
            if name in self.call.settings.needs_grad
        }
        self.head_grads: dict[str, torch.Tensor] = {}

    def zeros(self) -> dict[str, torch.Tensor]:
        """Return new sums of the head's gradients."""
        return {
            name: self.losses.new_zeros(getattr(self.inputs, name).shape)
            for name in _HEAD_INPUTS
            if name in self.call.settings.needs_grad
        }

    def roles_of(self, group: PairGroup, start: int) -> list[slice]:
        """Return where the group's rows of each role of the batch lie, from row ``start`` on."""
        roles = []
        for first in self.firsts:
            stop = start + first[group.stop] - first[group.first]
            roles.append(slice(start, stop))
            start = stop
        return roles

    def score(self, group: PairGroup, roles: list[slice]) -> None:
        """Score whole pairs and add their gradients."""
        span = slice(roles[0].start, roles[-1].stop)
        logps, kept = self._forward(span)
        sides = self._sides(group, roles, logps)
        scored, options = self._losses(group, sides)
        needs = tuple(side is not None for side in sides)
        forms = tuple(None if side is None else side.form for side in sides)
        slopes = self.loss_backend.preference_loss_bwd(
            self.slope[group.first : group.stop], scored, forms, options, needs
        )
        slopes = [slope[0] for slope in slopes if slope is not None]
        if len(slopes) > len(roles):
            # the third response has rows of its chosen one
            slopes[0] = slopes[0] + slopes.pop()
        self.head_grads = self.head_grads or self.zeros()
        self._backward(span, kept, torch.cat(slopes), self.head_grads)

    def stream(self, group: PairGroup, roles: list[slice]) -> None:
        """Score one pair span by span and add its gradients, scaled at the end."""
        heads = [self.zeros()]
        heads += [heads[0] if self.pairwise.options.of_margin else self.zeros() for _ in roles[1:]]
        # one sum serves a margin: chosen's rows minus rejected's
        signs = [-1.0 if self.pairwise.options.of_margin and i else 1.0 for i in range(len(roles))]
        logps = []
        for role, head, sign in zip(roles, heads, signs, strict=True):
            for start in range(role.start, role.stop, self.call.plan.group_rows):
                span = slice(start, min(start + self.call.plan.group_rows, role.stop))
                values, kept = self._forward(span)
                logps.append(values)
                self._backward(span, kept, torch.full_like(values, sign), head)
                # the next span's exponentials must not be made beside these
                del kept
        sides = self._sides(group, roles, torch.cat(logps) if logps else self.losses[:0])
        scored, _ = self._losses(group, sides)
        grads = scored.grads[:, 0] / len(self.pairwise.pair_rows)
        scales = torch.stack([grads[0] + grads[2], grads[1] + grads[3], grads[4]])
        for role, scale, sign in zip(roles, scales, signs, strict=False):
            for grad in self.row_grads.values():
                grad[role] *= scale * sign
        if self.pairwise.options.of_margin:
            heads, scales = heads[:1], scales[:1]
        for head, scale in zip(heads, scales, strict=False):
            for value in head.values():
                value *= scale
        # a single pair needs no further sums
        if not self.head_grads:
            self.head_grads = heads.pop(0)
        for head in heads:
            for name, value in head.items():
                self.head_grads[name] += value

    def _forward(self, span: slice) -> tuple[torch.Tensor, Kept]:
        values, kept = self.backend.forward(self.call, *self._span_inputs(span))
        return values["logps"], kept

    def _backward(
        self, span: slice, kept: Kept, slopes: torch.Tensor, heads: dict[str, torch.Tensor]
    ) -> None:
        into = {name: grad[span] for name, grad in self.row_grads.items()} | heads
        grads = RowGrads(slopes.to(kept.logsumexp.dtype), None, None, None)
        rows, inputs = self._span_inputs(span)
        self.backend.backward(
            self.call, rows, inputs, kept, grads, self.call.settings.needs_grad, into=into
        )

    def _span_inputs(self, span: slice) -> tuple[Rows, Inputs]:
        rows = self.rows
        if span != slice(0, rows.count):
            index = tuple(axis[span] for axis in rows.index)
            rows = Rows(span.stop - span.start, rows.shape, index)
        return rows, self.inputs._replace(labels=self.inputs.labels[span])

    def _sides(
        self, group: PairGroup, roles: list[slice], logps: torch.Tensor
    ) -> list[Side | None]:
        """Return chosen, rejected and third responses as packed tokens with offsets."""
        pairs = slice(group.first, group.stop)
        tensors, start = self.tensors, roles[0].start
        sides = []
        for i, role in enumerate(roles):
            ref = None
            if tensors.ref_sums is not None:
                ref = tensors.ref_sums[i, pairs]
            elif tensors.ref_rows is not None:
                ref = tensors.ref_rows[None, role]
            offsets = self.offsets[i, group.first : group.stop + 1]
            mask = tensors.chosen_mask if i == 0 else None
            sides.append(
                Side(
                    logps=logps[None, role.start - start : role.stop - start],
                    ref=ref,
                    mask=None if mask is None else mask[None, role],
                    offsets=offsets - offsets[0],
                    lengths=tensors.token_counts[i, pairs],
                )
            )
        if tensors.response_mask is not None:
            mask = tensors.response_mask[None, roles[0]]
            lengths = tensors.token_counts[2, pairs]
            sides.append(sides[0]._replace(ref=None, mask=mask, lengths=lengths))
        return [*sides, None][:3]

    def _losses(self, group: PairGroup, sides: list[Side | None]) -> tuple[Scored, LossOptions]:
        """Fill the group's outputs; return what the backward needs."""
        pairs = slice(group.first, group.stop)
        options, counts = self.pairwise.options, self.pairwise.pair_tokens
        weights = list(options.weights)
        for i, loss in enumerate(options.losses):
            if loss.mean_over:
                # a mean over the batch's tokens, not over the group's
                whole, of_group = (
                    len(some) / max(1, sum(pair[side] for pair in some for side in loss.mean_over))
                    for some in (counts, counts[pairs])
                )
                weights[i] *= whole / of_group
        options = dataclasses.replace(options, weights=tuple(weights))
        data = PairData(*(None if t is None else t[pairs] for t in self.tensors.data))
        scored = self.loss_backend.preference_loss_fwd(*sides, data, options)
        self.losses[pairs] = scored.losses
        self.rewards[:, pairs], self.sums[:, pairs] = scored.rewards, scored.sums
        return scored, options


def _gather(tensor: torch.Tensor | None, order: list[slice]) -> torch.Tensor | None:
    """Return the rows in another order; a tensor already in order is not copied."""
    if tensor is None or len(order) == 1 or _is_sorted(order):
        return tensor
    return torch.cat([tensor[run] for run in order])


def _is_sorted(order: list[slice]) -> bool:
    return all(left.stop == right.start for left, right in zip(order, order[1:], strict=False))


def _reordered(rows: Rows, order: list[slice], device: torch.device) -> Rows:
    index = rows.index
    if index is None:
        places, T = torch.arange(rows.count, device=device), rows.shape[1]
        index = (places // T, places % T)
    return Rows(rows.count, rows.shape, tuple(_gather(axis, order) for axis in index))
