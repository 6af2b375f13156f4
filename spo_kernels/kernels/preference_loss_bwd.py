"""Gradients of the pairwise preference losses, in the form their log-probs were given.

    grad of a token of pair p = g[p] (score[p] weight + plain[p])
        + sum over losses of ranks of g[rank] rank_grad[p]
        + sum over losses with a statistic of (sum_q g[q] loss_slope[q]) statistic_slope[p]

Symbols: P pairs, g the upstream gradient of their losses. One program owns BLOCK_P pairs of one
response; all arithmetic is fp32.
"""

import torch
import triton
import triton.language as tl

from spo_kernels.calls.preference_loss import Form, LossOptions, Scored
from spo_kernels.kernels.device import cdiv, device_guard
from spo_kernels.kernels.pair_tokens import form_pointers_of, launch_shape, write_side


@triton.jit
def _dot(grad_losses_ptr, stride_grad_losses_p, stat_ptr, P, BLOCK: tl.constexpr):
    # upstream gradient times dloss / dstatistic, over all pairs
    acc = tl.zeros([BLOCK], tl.float32)
    for q in range(0, P, BLOCK):
        offs_q = tl.arange(0, BLOCK).to(tl.int64) + q
        mask_q = offs_q < P
        g = tl.load(grad_losses_ptr + offs_q * stride_grad_losses_p, mask=mask_q, other=0.0)
        slope = tl.load(stat_ptr + offs_q, mask=mask_q, other=0.0)
        # inf * 0 is NaN: the product is 0 where either factor is 0
        acc += tl.where(g == 0.0, 0.0, g.to(tl.float32) * slope)
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["P", "stride_grad_losses_p"])
def _preference_loss_bwd_kernel(
    chosen,  # SidePointers
    rejected,  # SidePointers
    response,  # SidePointers or None
    grad_losses_ptr,  # [P]
    grads_ptr,  # [5, P] fp32
    tails_ptr,  # [2, P] int64 or None
    ranks_ptr,  # [L, 2, P] int32 or None
    rank_grads_ptr,  # [L, 2, P] fp32 or None
    stats_ptr,  # [L, 2, P] fp32 or None
    grad_chosen_ptr,  # like chosen's log-probs, out, or None
    grad_rejected_ptr,  # like rejected's log-probs, out, or None
    grad_response_ptr,  # like the response's log-probs, out, or None
    P,
    stride_grad_losses_p,
    ld_alpha,
    KINDS: tl.constexpr,  # one LossType.kind a loss type
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # axis 1 is the response: chosen, rejected, third
    which = tl.program_id(1)
    offs_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < P

    # [BLOCK_P]
    upstream = tl.load(grad_losses_ptr + offs_p * stride_grad_losses_p, mask=mask_p, other=0.0).to(
        tl.float32
    )
    if which == 2:
        if grad_response_ptr is not None:
            score = upstream * tl.load(grads_ptr + 4 * P + offs_p, mask=mask_p, other=0.0)
            zero = tl.zeros_like(score)
            write_side(
                side=response,
                out_ptr=grad_response_ptr,
                score=score,
                plain=zero,
                tails_ptr=None,
                ld_alpha=1.0,
                P=P,
                offs_p=offs_p,
                mask_p=mask_p,
                BLOCK_T=BLOCK_T,
            )
    else:
        row = which * P
        score = upstream * tl.load(grads_ptr + row + offs_p, mask=mask_p, other=0.0)
        plain = upstream * tl.load(grads_ptr + 2 * P + row + offs_p, mask=mask_p, other=0.0)
        for i in tl.static_range(len(KINDS)):
            if KINDS[i] == "ranked":
                at = 2 * i * P + row + offs_p
                rank = tl.load(ranks_ptr + at, mask=mask_p, other=0).to(tl.int64)
                of_rank = tl.load(
                    grad_losses_ptr + rank * stride_grad_losses_p, mask=mask_p, other=0.0
                )
                rank_grad = tl.load(rank_grads_ptr + at, mask=mask_p, other=0.0)
                score += of_rank.to(tl.float32) * rank_grad
            elif KINDS[i] == "statistic":
                stat_ptr = stats_ptr + 2 * i * P
                shared = _dot(grad_losses_ptr, stride_grad_losses_p, stat_ptr, P, BLOCK_T)
                slope = tl.load(stat_ptr + P + offs_p, mask=mask_p, other=0.0)
                moved = tl.where(slope == 0.0, 0.0, shared * slope)
                score += tl.where(which == 0, moved, -moved)
        if which == 0:
            if grad_chosen_ptr is not None:
                write_side(
                    side=chosen,
                    out_ptr=grad_chosen_ptr,
                    score=score,
                    plain=plain,
                    tails_ptr=tails_ptr,
                    ld_alpha=ld_alpha,
                    P=P,
                    offs_p=offs_p,
                    mask_p=mask_p,
                    BLOCK_T=BLOCK_T,
                )
        else:
            if grad_rejected_ptr is not None:
                tails_r_ptr = None
                if tails_ptr is not None:
                    tails_r_ptr = tails_ptr + P
                write_side(
                    side=rejected,
                    out_ptr=grad_rejected_ptr,
                    score=score,
                    plain=plain,
                    tails_ptr=tails_r_ptr,
                    ld_alpha=ld_alpha,
                    P=P,
                    offs_p=offs_p,
                    mask_p=mask_p,
                    BLOCK_T=BLOCK_T,
                )


def preference_loss_bwd(
    grad_losses: torch.Tensor,
    scored: Scored,
    forms: tuple[Form, Form, Form | None],
    call: LossOptions,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of the three responses' log-probs, None where not needed."""
    P, device = grad_losses.numel(), grad_losses.device
    grads = [
        torch.empty(form.shape, dtype=form.dtype, device=device) if needed else None
        for form, needed in zip(forms, needs, strict=True)
    ]
    if P == 0:
        # tokens without a pair
        return tuple(grad if grad is None else grad.zero_() for grad in grads)
    has_tokens = any(form is not None and form.has_tokens for form in forms)
    block_p, block_t, num_warps = launch_shape(P, has_tokens, False)
    pointers = [None if form is None else form_pointers_of(form) for form in forms]
    with device_guard(grad_losses):
        _preference_loss_bwd_kernel[(cdiv(P, block_p), 2 + needs[2])](
            chosen=pointers[0],
            rejected=pointers[1],
            response=pointers[2],
            grad_losses_ptr=grad_losses,
            grads_ptr=scored.grads,
            tails_ptr=scored.tails,
            ranks_ptr=scored.ranks,
            rank_grads_ptr=scored.rank_grads,
            stats_ptr=scored.stats,
            grad_chosen_ptr=grads[0],
            grad_rejected_ptr=grads[1],
            grad_response_ptr=grads[2],
            P=P,
            stride_grad_losses_p=grad_losses.stride(0),
            ld_alpha=1.0 if call.ld_alpha is None else call.ld_alpha,
            KINDS=tuple(loss.kind for loss in call.losses),
            BLOCK_P=block_p,
            BLOCK_T=block_t,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )
    return tuple(grads)
