"""The kernels of ``preference_loss`` as custom ops: responses laid out in a row and taken apart."""

from collections.abc import Sequence

import torch

from spo_kernels.calls.preference_loss import GRAD_ROWS, Form, PairCall, PairData, Scored, Side
from spo_kernels.ops.graph.loss_op import Like, loss_in_graph

_RESPONSES = ("chosen", "rejected", "response")
# what a side has beside its log-probs
_OTHERS = Side._fields[1:]


def preference_loss_in_graph(
    chosen: Side, rejected: Side, response: Side, data: PairData, call: PairCall
) -> list[torch.Tensor]:
    """Return losses ``[P]``, rewards and sums ``[2, P]``; the call's backend is triton."""
    sides = (chosen, rejected, response)
    others = (tensor for side in sides for tensor in side[1:])
    return _in_graph(call, *(side.logps for side in sides), *others, *data)


def _sides_of(tensors: Sequence[torch.Tensor | None]) -> tuple[Side, Side, Side | None]:
    others = tensors[len(_RESPONSES) :]
    sides = [
        Side(logps, *others[i * len(_OTHERS) : (i + 1) * len(_OTHERS)])
        for i, logps in enumerate(tensors[: len(_RESPONSES)])
    ]
    return sides[0], sides[1], None if sides[2].logps is None else sides[2]


def _forward(call: PairCall, *tensors: torch.Tensor | None) -> Scored:
    from spo_kernels.kernels.preference_loss import preference_loss_fwd

    data = PairData(*tensors[-len(PairData._fields) :])
    return preference_loss_fwd(*_sides_of(tensors), data, call)


def _like(call: PairCall, *tensors: torch.Tensor | None) -> Scored:
    """Return what the results of ``_forward`` are allocated as."""
    P, L = _sides_of(tensors)[0].form.pairs, len(call.losses)
    sorts = any(loss.sorts for loss in call.losses)
    has_statistic = any(loss.has_statistic for loss in call.losses)
    return Scored(
        losses=Like((P,)),
        rewards=Like((2, P)),
        sums=Like((2, P)),
        grads=Like((len(GRAD_ROWS), P)),
        tails=None if call.ld_alpha is None else Like((2, P), torch.int64),
        ranks=Like((L, 2, P), torch.int32) if sorts else None,
        rank_grads=Like((L, 2, P)) if sorts else None,
        stats=Like((L, 2, P)) if has_statistic else None,
    )


def _backward(
    call: PairCall,
    grad_losses: torch.Tensor,
    saved: Sequence[torch.Tensor | None],
    likes: Sequence[Like | None],
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of the three responses' log-probs."""
    from spo_kernels.kernels.preference_loss import preference_loss_bwd

    masks, offsets, kept = saved[:3], saved[3:6], saved[6:]
    forms = tuple(
        None if like is None else Form(*like, mask, places)
        for like, mask, places in zip(likes, masks, offsets, strict=True)
    )
    return preference_loss_bwd(grad_losses, Scored.of_kept(kept), forms, call, needs)


_in_graph = loss_in_graph(
    "preference_loss",
    ", ".join(
        (
            "chosen_logps, rejected_logps, response_logps?",
            *(f"{which}_{field}?" for which in _RESPONSES for field in _OTHERS),
            *(f"{field}?" for field in PairData._fields),
        )
    ),
    call_type=PairCall,
    differentiable=3,
    outputs=3,
    saved=tuple(f"{which}_{field}" for field in ("mask", "offsets") for which in _RESPONSES),
    forward=_forward,
    like=_like,
    backward=_backward,
)
