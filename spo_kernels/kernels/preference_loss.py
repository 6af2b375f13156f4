"""Pairwise preference losses and their gradients on sequence log-probs.

    c = chosen - ref_chosen        r = rejected - ref_rejected
    loss[p]          = sum_i weights[i] * loss_i(c, r, lengths; parameters)
    grad_chosen[p]   = dloss / dchosen, grad_rejected[p] likewise
    rewards          = beta * c, beta * r

Symbols: P pairs. One program owns BLOCK_P pairs; all arithmetic is fp32. The formulas of the types
are in ``loss_table.py``; each has one function here, returning (loss, grad_chosen, grad_rejected).
"""

import torch
import triton
import triton.language as tl

from spo_kernels.kernels.device import device_guard
from spo_kernels.loss_table import Parameters, loss_type_of

BLOCK_P = 128
NUM_WARPS = 4

_SIGMOID = tl.constexpr(loss_type_of("sigmoid").id)
_HINGE = tl.constexpr(loss_type_of("hinge").id)
_IPO = tl.constexpr(loss_type_of("ipo").id)


@triton.jit
def _softplus_and_sigmoid(x):
    # one exponential that cannot overflow serves both
    small = tl.exp(-tl.abs(x))
    one_plus = 1.0 + small
    # log(1 + small) / (one_plus - 1) is free of the rounding of one_plus
    is_lost = one_plus == 1.0
    log1p = tl.where(is_lost, small, tl.log(one_plus) * (small / (one_plus - 1.0 + is_lost)))
    return tl.maximum(x, 0.0) + log1p, tl.where(x >= 0.0, 1.0, small) / one_plus


@triton.jit
def _sigmoid(c, r, length_c, length_r, parameters):
    loss, sigmoid = _softplus_and_sigmoid(-parameters.beta * (c - r))
    grad = -parameters.beta * sigmoid
    return loss, grad, -grad


@triton.jit
def _hinge(c, r, length_c, length_r, parameters):
    slack = 1.0 - parameters.beta * (c - r)
    # not maximum(): it would turn a NaN into 0
    loss = tl.where(slack <= 0.0, 0.0, slack)
    # no gradient at the kink itself, like relu
    grad = tl.where(slack <= 0.0, 0.0, -parameters.beta)
    return loss, grad, -grad


@triton.jit
def _ipo(c, r, length_c, length_r, parameters):
    error = c / length_c - r / length_r - 0.5 / parameters.beta
    return error * error, 2.0 * error / length_c, -2.0 * error / length_r


@triton.jit
def _loss_of(c, r, length_c, length_r, parameters, LOSS: tl.constexpr):
    if LOSS == _SIGMOID:
        loss, grad_c, grad_r = _sigmoid(c, r, length_c, length_r, parameters)
    elif LOSS == _HINGE:
        loss, grad_c, grad_r = _hinge(c, r, length_c, length_r, parameters)
    else:
        tl.static_assert(LOSS == _IPO, "a loss id without a kernel function")
        loss, grad_c, grad_r = _ipo(c, r, length_c, length_r, parameters)
    return loss, grad_c, grad_r


@triton.jit
def _preference_loss_fwd_kernel(
    chosen_ptr,  # [P]
    rejected_ptr,  # [P]
    ref_chosen_ptr,  # [P], read if HAS_REF
    ref_rejected_ptr,  # [P], read if HAS_REF
    chosen_lengths_ptr,  # [P] int, read if HAS_LENGTHS
    rejected_lengths_ptr,  # [P] int, read if HAS_LENGTHS
    losses_ptr,  # [P] fp32, out
    grads_ptr,  # [2, P] fp32, out: dloss / dchosen, dloss / drejected
    rewards_ptr,  # [2, P] fp32, out: of chosen, of rejected
    P,
    parameters,  # Parameters of fp32
    weights,  # one fp32 a loss type
    HAS_REF: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    LOSSES: tl.constexpr,  # tuple of ids from loss_table
    BLOCK_P: tl.constexpr,
):
    offs_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < P

    # [BLOCK_P]
    c = tl.load(chosen_ptr + offs_p, mask=mask_p, other=0.0).to(tl.float32)
    r = tl.load(rejected_ptr + offs_p, mask=mask_p, other=0.0).to(tl.float32)
    if HAS_REF:
        c -= tl.load(ref_chosen_ptr + offs_p, mask=mask_p, other=0.0).to(tl.float32)
        r -= tl.load(ref_rejected_ptr + offs_p, mask=mask_p, other=0.0).to(tl.float32)
    if HAS_LENGTHS:
        length_c = tl.load(chosen_lengths_ptr + offs_p, mask=mask_p, other=1)
        length_r = tl.load(rejected_lengths_ptr + offs_p, mask=mask_p, other=1)
        # an empty completion has score 0 and must not divide by 0
        length_c = tl.maximum(length_c, 1).to(tl.float32)
        length_r = tl.maximum(length_r, 1).to(tl.float32)
    else:
        length_c = tl.full([BLOCK_P], 1.0, tl.float32)
        length_r = length_c

    acc_loss = tl.zeros([BLOCK_P], tl.float32)
    acc_grad_c = tl.zeros([BLOCK_P], tl.float32)
    acc_grad_r = tl.zeros([BLOCK_P], tl.float32)
    for i in tl.static_range(len(LOSSES)):
        loss, grad_c, grad_r = _loss_of(c, r, length_c, length_r, parameters, LOSSES[i])
        acc_loss += weights[i] * loss
        acc_grad_c += weights[i] * grad_c
        acc_grad_r += weights[i] * grad_r

    tl.store(losses_ptr + offs_p, acc_loss, mask=mask_p)
    tl.store(grads_ptr + offs_p, acc_grad_c, mask=mask_p)
    tl.store(grads_ptr + P + offs_p, acc_grad_r, mask=mask_p)
    tl.store(rewards_ptr + offs_p, parameters.beta * c, mask=mask_p)
    tl.store(rewards_ptr + P + offs_p, parameters.beta * r, mask=mask_p)


def preference_loss_fwd(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor | None,
    ref_rejected: torch.Tensor | None,
    chosen_lengths: torch.Tensor | None,
    rejected_lengths: torch.Tensor | None,
    *,
    loss_types: tuple[str, ...],
    weights: tuple[float, ...],
    parameters: Parameters,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (losses [P], grads [2, P], rewards [2, P]). Inputs are checked, 1-D, of one length."""
    P = chosen.numel()
    losses = torch.empty(P, dtype=torch.float32, device=chosen.device)
    grads = torch.empty(2, P, dtype=torch.float32, device=chosen.device)
    rewards = torch.empty_like(grads)
    if P == 0:
        return losses, grads, rewards
    has_ref, has_lengths = ref_chosen is not None, chosen_lengths is not None
    with device_guard(chosen):
        _preference_loss_fwd_kernel[(triton.cdiv(P, BLOCK_P),)](
            chosen_ptr=chosen.contiguous(),
            rejected_ptr=rejected.contiguous(),
            ref_chosen_ptr=ref_chosen.contiguous() if has_ref else None,
            ref_rejected_ptr=ref_rejected.contiguous() if has_ref else None,
            chosen_lengths_ptr=chosen_lengths.contiguous() if has_lengths else None,
            rejected_lengths_ptr=rejected_lengths.contiguous() if has_lengths else None,
            losses_ptr=losses,
            grads_ptr=grads,
            rewards_ptr=rewards,
            P=P,
            parameters=parameters,
            weights=weights,
            HAS_REF=has_ref,
            HAS_LENGTHS=has_lengths,
            LOSSES=tuple(loss_type_of(name).id for name in loss_types),
            BLOCK_P=BLOCK_P,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return losses, grads, rewards
