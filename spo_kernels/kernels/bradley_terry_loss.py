"""Bradley-Terry loss of a reward model and its gradient on the rewards of P pairs.

    x[p]             = chosen[p] - rejected[p] - margins[p],  total[p] = chosen[p] + rejected[p]
    losses[p]        = softplus(-x[p]) + center * total[p]^2
    grad_chosen[p]   = -sigmoid(-x[p]) + 2 center total[p]
    grad_rejected[p] =  sigmoid(-x[p]) + 2 center total[p]
    is_correct[p]    = chosen[p] > rejected[p]

Symbols: P pairs. One program owns BLOCK_P pairs; all arithmetic is fp32.
"""

import torch
import triton
import triton.language as tl

from spo_kernels.kernels.device import cdiv, device_guard
from spo_kernels.kernels.scalar_math import softplus_and_sigmoid

BLOCK_P = 128
NUM_WARPS = 4


@triton.jit
def _bradley_terry_loss_fwd_kernel(
    chosen_ptr,  # [P]
    rejected_ptr,  # [P]
    margins_ptr,  # [P], read if HAS_MARGINS
    losses_ptr,  # [P] fp32, out
    grads_ptr,  # [2, P] fp32, out: dloss / dchosen, dloss / drejected
    is_correct_ptr,  # [P] bool, out
    P,
    center,
    HAS_MARGINS: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    offs_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < P

    # [BLOCK_P]
    chosen = tl.load(chosen_ptr + offs_p, mask=mask_p, other=0.0).to(tl.float32)
    rejected = tl.load(rejected_ptr + offs_p, mask=mask_p, other=0.0).to(tl.float32)
    x = chosen - rejected
    if HAS_MARGINS:
        x -= tl.load(margins_ptr + offs_p, mask=mask_p, other=0.0).to(tl.float32)

    loss, sigmoid = softplus_and_sigmoid(-x)
    grad_chosen, grad_rejected = -sigmoid, sigmoid
    # not a product with 0: an infinite reward would turn it into NaN
    if HAS_CENTER:
        total = chosen + rejected
        loss += center * total * total
        pull = 2.0 * center * total
        grad_chosen += pull
        grad_rejected += pull

    tl.store(losses_ptr + offs_p, loss, mask=mask_p)
    tl.store(grads_ptr + offs_p, grad_chosen, mask=mask_p)
    tl.store(grads_ptr + P + offs_p, grad_rejected, mask=mask_p)
    tl.store(is_correct_ptr + offs_p, chosen > rejected, mask=mask_p)


def bradley_terry_loss_fwd(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    margins: torch.Tensor | None,
    *,
    center: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (losses [P], grads [2, P], is_correct [P]). Inputs are checked, 1-D, of one length."""
    P = chosen.numel()
    losses = torch.empty(P, dtype=torch.float32, device=chosen.device)
    grads = torch.empty(2, P, dtype=torch.float32, device=chosen.device)
    is_correct = torch.empty(P, dtype=torch.bool, device=chosen.device)
    if P == 0:
        return losses, grads, is_correct
    with device_guard(chosen):
        _bradley_terry_loss_fwd_kernel[(cdiv(P, BLOCK_P),)](
            chosen_ptr=chosen.contiguous(),
            rejected_ptr=rejected.contiguous(),
            margins_ptr=None if margins is None else margins.contiguous(),
            losses_ptr=losses,
            grads_ptr=grads,
            is_correct_ptr=is_correct,
            P=P,
            center=center,
            HAS_MARGINS=margins is not None,
            HAS_CENTER=center != 0.0,
            BLOCK_P=BLOCK_P,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return losses, grads, is_correct
