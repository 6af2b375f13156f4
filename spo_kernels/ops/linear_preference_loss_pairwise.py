"""Strategy ``pairwise`` of ``linear_preference_loss``: the loss of a group while its tiles live.

A group of whole pairs is scored as ``resident`` does it, its loss and the slope of every token
follow, and its exponentials become gradients at once. A streamed pair goes piece by piece with
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
from spo_kernels.calls.preference_loss import PairCall, PairData, Scored, Side
from spo_kernels.ops.linear_logprob_call import backend_of
from spo_kernels.ops.preference_loss import loss_backend_of
from spo_kernels.planner.linear_preference_loss import PairGroup

# rows of the head that are scaled and cast at once
_HEAD_STEP = 4096
ROW_INPUTS, _HEAD_INPUTS = ("hidden", "lora_a"), ("weight", "bias", "lora_b")


@dataclasses.dataclass(frozen=True)
class PairwiseCall:
    """Non-tensor state of a call: how pieces are scored, how pairs are grouped, what they lose."""

    call: Call
    loss: PairCall
    groups: tuple[PairGroup, ...]
    group_rows: int
    is_margin: bool
    # host counts, one sequence a pair: rows scored of each block of the batch, and tokens that
    # count of chosen, rejected and, where there is one, the third response
    pair_rows: Sequence[Sequence[int]]
    pair_tokens: Sequence[Sequence[int]]


class PairTensors(NamedTuple):
    """What the loss reads beside the log-probs."""

    row_counts: torch.Tensor  # [blocks, P] int64: pair_rows on the device
    token_counts: torch.Tensor  # [responses, P] int64: pair_tokens on the device
    ref_sums: torch.Tensor | None  # [blocks, P]
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
        blocks = run.blocks_of(group, start)
        if group.streamed:
            run.stream(group, blocks)
        else:
            run.score(group, blocks)
        start = blocks[-1].stop
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
            part = slice(start, start + _HEAD_STEP)
            out[part] = kept[part] * upstream
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
        self.backend, self.loss_backend = (
            backend_of(self.call.backend),
            loss_backend_of(pairwise.loss.backend),
        )
        # first row of every response in batch order, [blocks][P + 1]
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

        dtype = torch.float64 if self.call.compute_dtype == torch.float64 else torch.float32
        P = len(pairwise.pair_rows)
        self.losses = torch.empty(P, dtype=dtype, device=inputs.hidden.device)
        self.rewards, self.sums = self.losses.new_empty(2, P), self.losses.new_empty(2, P)
        self.slope = self.losses.new_full((P,), 1.0 / P)
        self.row_grads = {
            name: self.losses.new_zeros(rows.count, getattr(inputs, name).shape[-1])
            for name in ROW_INPUTS
            if name in self.call.needs_grad
        }
        self.head_grads: dict[str, torch.Tensor] = {}

    def zeros(self) -> dict[str, torch.Tensor]:
        """Return new sums of the head's gradients."""
        return {
            name: self.losses.new_zeros(getattr(self.inputs, name).shape)
            for name in _HEAD_INPUTS
            if name in self.call.needs_grad
        }

    def blocks_of(self, group: PairGroup, start: int) -> list[slice]:
        """Return where the group's rows of each block of the batch lie, from row ``start`` on."""
        blocks = []
        for first in self.firsts:
            stop = start + first[group.stop] - first[group.first]
            blocks.append(slice(start, stop))
            start = stop
        return blocks

    def score(self, group: PairGroup, blocks: list[slice]) -> None:
        """Score whole pairs and add their gradients."""
        piece = slice(blocks[0].start, blocks[-1].stop)
        logps, kept = self._forward(piece)
        sides = self._sides(group, blocks, logps)
        scored, call = self._losses(group, sides)
        needs = tuple(side is not None for side in sides)
        forms = tuple(None if side is None else side.form for side in sides)
        slopes = self.loss_backend.preference_loss_bwd(
            self.slope[group.first : group.stop], scored, forms, call, needs
        )
        slopes = [slope[0] for slope in slopes if slope is not None]
        if len(slopes) > len(blocks):
            # the third response has rows of its chosen one
            slopes[0] = slopes[0] + slopes.pop()
        self.head_grads = self.head_grads or self.zeros()
        self._backward(piece, kept, torch.cat(slopes), self.head_grads)

    def stream(self, group: PairGroup, blocks: list[slice]) -> None:
        """Score one pair piece by piece and add its gradients, scaled at the end."""
        heads = [self.zeros()]
        heads += [heads[0] if self.pairwise.is_margin else self.zeros() for _ in blocks[1:]]
        # one sum serves a margin: chosen's rows minus rejected's
        signs = [-1.0 if self.pairwise.is_margin and i else 1.0 for i in range(len(blocks))]
        logps = []
        for block, head, sign in zip(blocks, heads, signs, strict=True):
            for start in range(block.start, block.stop, self.pairwise.group_rows):
                piece = slice(start, min(start + self.pairwise.group_rows, block.stop))
                values, kept = self._forward(piece)
                logps.append(values)
                self._backward(piece, kept, torch.full_like(values, sign), head)
                # the next piece's exponentials must not be made beside these
                del kept
        sides = self._sides(group, blocks, torch.cat(logps) if logps else self.losses[:0])
        scored, _ = self._losses(group, sides)
        grads = scored.grads[:, 0] / len(self.pairwise.pair_rows)
        scales = torch.stack([grads[0] + grads[2], grads[1] + grads[3], grads[4]])
        for block, scale, sign in zip(blocks, scales, signs, strict=False):
            for grad in self.row_grads.values():
                grad[block] *= scale * sign
        if self.pairwise.is_margin:
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

    def _forward(self, piece: slice) -> tuple[torch.Tensor, Kept]:
        values, kept = self.backend.forward(self.call, *self._part(piece))
        return values["logps"], kept

    def _backward(
        self, piece: slice, kept: Kept, slopes: torch.Tensor, heads: dict[str, torch.Tensor]
    ) -> None:
        into = {name: grad[piece] for name, grad in self.row_grads.items()} | heads
        grads = RowGrads(slopes.to(kept.logsumexp.dtype), None, None, None)
        rows, inputs = self._part(piece)
        self.backend.backward(self.call, rows, inputs, kept, grads, self.call.needs_grad, into=into)

    def _part(self, piece: slice) -> tuple[Rows, Inputs]:
        rows = self.rows
        if piece != slice(0, rows.count):
            index = tuple(axis[piece] for axis in rows.index)
            rows = Rows(piece.stop - piece.start, rows.shape, index)
        return rows, self.inputs._replace(labels=self.inputs.labels[piece])

    def _sides(
        self, group: PairGroup, blocks: list[slice], logps: torch.Tensor
    ) -> list[Side | None]:
        """Return chosen, rejected and third responses as packed tokens with offsets."""
        pairs = slice(group.first, group.stop)
        tensors, start = self.tensors, blocks[0].start
        sides = []
        for i, block in enumerate(blocks):
            ref = None
            if tensors.ref_sums is not None:
                ref = tensors.ref_sums[i, pairs]
            elif tensors.ref_rows is not None:
                ref = tensors.ref_rows[None, block]
            offsets = self.offsets[i, group.first : group.stop + 1]
            mask = tensors.chosen_mask if i == 0 else None
            sides.append(
                Side(
                    logps=logps[None, block.start - start : block.stop - start],
                    ref=ref,
                    mask=None if mask is None else mask[None, block],
                    offsets=offsets - offsets[0],
                    lengths=tensors.token_counts[i, pairs],
                )
            )
        if tensors.response_mask is not None:
            mask = tensors.response_mask[None, blocks[0]]
            lengths = tensors.token_counts[2, pairs]
            sides.append(sides[0]._replace(ref=None, mask=mask, lengths=lengths))
        return [*sides, None][:3]

    def _losses(self, group: PairGroup, sides: list[Side | None]) -> tuple[Scored, PairCall]:
        """Fill the group's outputs; return what the backward needs."""
        pairs = slice(group.first, group.stop)
        call, counts = self.pairwise.loss, self.pairwise.pair_tokens
        weights = list(call.weights)
        for i, loss in enumerate(call.losses):
            if loss.mean_over:
                # a mean over the batch's tokens, not over the group's
                whole, part = (
                    len(some) / max(1, sum(pair[side] for pair in some for side in loss.mean_over))
                    for some in (counts, counts[pairs])
                )
                weights[i] *= whole / part
        call = dataclasses.replace(call, weights=tuple(weights))
        data = PairData(*(None if t is None else t[pairs] for t in self.tensors.data))
        scored = self.loss_backend.preference_loss_fwd(*sides, data, call)
        self.losses[pairs] = scored.losses
        for side in range(2):
            self.rewards[side, pairs], self.sums[side, pairs] = (
                scored.rewards[side],
                scored.sums[side],
            )
        return scored, call


def _gather(tensor: torch.Tensor | None, order: list[slice]) -> torch.Tensor | None:
    """Return the rows in another order; what is in order stays."""
    if tensor is None or len(order) == 1 or _is_sorted(order):
        return tensor
    return torch.cat([tensor[part] for part in order])


def _is_sorted(order: list[slice]) -> bool:
    return all(left.stop == right.start for left, right in zip(order, order[1:], strict=False))


def _reordered(rows: Rows, order: list[slice], device: torch.device) -> Rows:
    index = rows.index
    if index is None:
        places, T = torch.arange(rows.count, device=device), rows.shape[1]
        index = (places // T, places % T)
    return Rows(rows.count, rows.shape, tuple(_gather(axis, order) for axis in index))
