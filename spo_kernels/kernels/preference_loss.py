"""Pairwise preference losses and their gradients, from token log-probs or their sums.

    pc, pr   = sums of the policy's log-probs over the tokens that count
    c, r     = the same minus the reference's; tokens beyond the shared length weigh ld_alpha
    loss[p]  = w[p] sum_i weights[i] * loss_i(...)
    grads    = dloss[p] / dscore of both sides, / dplain log-prob of both, / dresponse
    rewards  = beta * c, beta * r

Symbols: P pairs. One program owns BLOCK_P pairs and walks their tokens BLOCK_T at a time; a mix
with a batch type runs as one program that owns all pairs. All arithmetic is fp32. The loss types
are functions in ``preference_terms.py``, and the kernel is compiled for those it is handed.
"""

import torch
import triton
import triton.language as tl

from spo_kernels.calls.loss_table import LOSS_TYPES
from spo_kernels.calls.preference_loss import GRAD_ROWS, LossOptions, PairData, Scored, Side
from spo_kernels.kernels import preference_terms
from spo_kernels.kernels.device import cdiv, device_guard
from spo_kernels.kernels.pair_tokens import (
    MAX_REGISTERS,
    SCRATCH_ROWS,
    bounds,
    contiguous,
    launch_shape,
    pointers_of,
    read_side,
    tail_of,
    token_count,
)
from spo_kernels.kernels.preference_loss_bwd import preference_loss_bwd
from spo_kernels.kernels.preference_terms import LARGEST_EXPONENT, Pair
from spo_kernels.kernels.scalar_math import expm1, softplus_and_sigmoid

__all__ = ["preference_loss_bwd", "preference_loss_fwd"]

# a row without its function fails here, at import
TERM_OF = {row.name: getattr(preference_terms, row.name) for row in LOSS_TYPES}

_DIVERGENCE_ID = {"reverse_kl": 0, "forward_kl": 1, "js_divergence": 2, "alpha_divergence": 1}
_JS = tl.constexpr(_DIVERGENCE_ID["js_divergence"])
_LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _divergence(c, power, DIVERGENCE: tl.constexpr):
    # f' of the ratio and its slope
    if DIVERGENCE == 0:
        return c, tl.full(c.shape, 1.0, tl.float32)
    if DIVERGENCE == _JS:
        down, lost = softplus_and_sigmoid(-c)
        return -(down - _LOG_2), lost
    exponent = power * c
    is_cut = exponent > LARGEST_EXPONENT
    cut = tl.where(is_cut, LARGEST_EXPONENT, exponent)
    return expm1(cut) / power, tl.where(is_cut, 0.0, tl.exp(cut))


@triton.jit
def _load_or_zero(ptr, offs_p, mask_p):
    value = tl.zeros(offs_p.shape, tl.float32)
    if ptr is not None:
        value = tl.load(ptr + offs_p, mask=mask_p, other=0.0).to(tl.float32)
    return value


# P = 1 must stay a value
@triton.jit(do_not_specialize=["P"])
def _preference_loss_fwd_kernel(
    chosen,  # SidePointers
    rejected,  # SidePointers
    response,  # SidePointers or None
    pair_weights_ptr,  # [P] or None
    reward_chosen_ptr,  # [P] or None
    reward_rejected_ptr,  # [P] or None
    losses_ptr,  # [P] fp32, out
    rewards_ptr,  # [2, P] fp32, out: of chosen, of rejected
    sums_ptr,  # [2, P] fp32, out: the policy's plain log-probs
    grads_ptr,  # [5, P] fp32, out: see GRAD_ROWS
    tails_ptr,  # [2, P] int64, out, or None: first token beyond the shared length
    ranks_ptr,  # [L, 2, P] int32, out, or None
    rank_grads_ptr,  # [L, 2, P] fp32, out, or None
    stats_ptr,  # [L, 2, P] fp32, out, or None
    scratch_ptr,  # [3, SCRATCH_ROWS, P] fp32 or None
    P,
    ld_alpha,
    divergence_power,
    parameters,  # Parameters of fp32
    weights,  # one fp32 a loss type
    terms,  # one jit function a loss type: constexprs, see preference_terms.py
    KINDS: tl.constexpr,  # one LossType.kind a loss type
    DIVERGENCE: tl.constexpr,
    HAS_RESPONSE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    offs_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < P

    # [BLOCK_P]
    start_c, end_c = bounds(chosen, offs_p, mask_p)
    start_r, end_r = bounds(rejected, offs_p, mask_p)
    tail_c = None
    tail_r = None
    if tails_ptr is not None:
        shared = tl.minimum(
            token_count(chosen.mask, start_c, end_c, BLOCK_T),
            token_count(rejected.mask, start_r, end_r, BLOCK_T),
        )
        tail_c = tail_of(chosen.mask, start_c, end_c, shared, BLOCK_T)
        tail_r = tail_of(rejected.mask, start_r, end_r, shared, BLOCK_T)
        tl.store(tails_ptr + offs_p, tail_c, mask=mask_p)
        tl.store(tails_ptr + P + offs_p, tail_r, mask=mask_p)
    # no lane reads what another side wrote
    scratch_r_ptr = scratch_ptr
    scratch_x_ptr = scratch_ptr
    if scratch_ptr is not None:
        scratch_r_ptr = scratch_ptr + SCRATCH_ROWS * P
        scratch_x_ptr = scratch_ptr + 2 * SCRATCH_ROWS * P
    score_c, policy_c, ref_c, pc, count_c, aligned_c = read_side(
        side=chosen,
        start=start_c,
        end=end_c,
        tail=tail_c,
        ld_alpha=ld_alpha,
        scratch_ptr=scratch_ptr,
        P=P,
        offs_p=offs_p,
        mask_p=mask_p,
        BLOCK_T=BLOCK_T,
    )
    score_r, policy_r, ref_r, pr, count_r, aligned_r = read_side(
        side=rejected,
        start=start_r,
        end=end_r,
        tail=tail_r,
        ld_alpha=ld_alpha,
        scratch_ptr=scratch_r_ptr,
        P=P,
        offs_p=offs_p,
        mask_p=mask_p,
        BLOCK_T=BLOCK_T,
    )
    x, px, count_x = pc, pc, count_c
    if HAS_RESPONSE:
        start_x, end_x = bounds(response, offs_p, mask_p)
        x, _, _, px, count_x, _ = read_side(
            side=response,
            start=start_x,
            end=end_x,
            tail=None,
            ld_alpha=1.0,
            scratch_ptr=scratch_x_ptr,
            P=P,
            offs_p=offs_p,
            mask_p=mask_p,
            BLOCK_T=BLOCK_T,
        )
    c, slope_c = _divergence(score_c, divergence_power, DIVERGENCE)
    r, slope_r = _divergence(score_r, divergence_power, DIVERGENCE)
    # an empty completion has score 0 and must not divide by 0; masked lanes count no tokens
    len_c, len_r = tl.maximum(count_c, 1.0), tl.maximum(count_r, 1.0)
    total_c, total_r = tl.sum(count_c, axis=0), tl.sum(count_r, axis=0)
    pairs = P.to(tl.float32)
    pair = Pair(
        c=c,
        r=r,
        pc=pc,
        pr=pr,
        ratio=policy_c - policy_r,
        ref_ratio=ref_c - ref_r,
        len_c=len_c,
        len_r=len_r,
        x=x,
        px=px,
        reward_c=_load_or_zero(reward_chosen_ptr, offs_p, mask_p),
        reward_r=_load_or_zero(reward_rejected_ptr, offs_p, mask_p),
        share_c=pairs / tl.maximum(total_c, 1.0),
        share_cr=pairs / tl.maximum(total_c + total_r, 1.0),
        share_x=pairs / tl.maximum(tl.sum(count_x, axis=0), 1.0),
        mask=mask_p,
        P=P,
    )
    weight = tl.full([BLOCK_P], 1.0, tl.float32)
    if pair_weights_ptr is not None:
        weight = tl.load(pair_weights_ptr + offs_p, mask=mask_p, other=0.0).to(tl.float32)
    if chosen.square_tokens is not None or chosen.square_sums is not None:
        weight *= tl.exp(aligned_c / len_c + aligned_r / len_r)
    if reward_chosen_ptr is not None:
        # a NaN reward must not pass for a filtered pair
        is_near = tl.abs(pair.reward_c - pair.reward_r) < parameters.min_reward_margin
        weight = tl.where(is_near, 0.0, weight)

    loss = tl.zeros([BLOCK_P], tl.float32)
    # through the scores, through the plain log-probs, through the response
    grad_c, grad_r, plain_c, plain_r, grad_x = loss, loss, loss, loss, loss
    for i in tl.static_range(len(KINDS)):
        scale = weights[i] * weight
        if KINDS[i] == "pair":
            own, own_c, own_r = terms[i](pair, parameters)
            grad_c += scale * own_c
            grad_r += scale * own_r
        elif KINDS[i] == "policy":
            own, own_c, own_r = terms[i](pair, parameters)
            plain_c += scale * own_c
            plain_r += scale * own_r
        elif KINDS[i] == "response":
            own, own_x = terms[i](pair, parameters)
            grad_x += scale * own_x
        elif KINDS[i] == "statistic":
            own, own_c, own_r, loss_slope, slope = terms[i](pair, parameters)
            grad_c += scale * own_c
            grad_r += scale * own_r
            row_ptr = stats_ptr + 2 * i * P
            tl.store(row_ptr + offs_p, scale * loss_slope, mask=mask_p)
            tl.store(row_ptr + P + offs_p, parameters.beta * slope, mask=mask_p)
        else:
            tl.static_assert(KINDS[i] == "ranked", "a kind the kernel does not know")
            own, slope, order_c, order_r = terms[i](pair, parameters)
            # lane k holds rank k: its slope belongs to the pairs that have this rank
            rank = offs_p.to(tl.int32)
            row_ptr = ranks_ptr + 2 * i * P
            tl.store(row_ptr + order_c, rank, mask=mask_p)
            tl.store(row_ptr + P + order_r, rank, mask=mask_p)
            row_ptr = rank_grads_ptr + 2 * i * P
            tl.store(row_ptr + order_c, scale * slope, mask=mask_p)
            tl.store(row_ptr + P + order_r, -(scale * slope), mask=mask_p)
        loss += scale * own

    # a pair that counts nothing has no part in the loss, whatever its own is
    counts = weight != 0.0
    tl.store(losses_ptr + offs_p, tl.where(counts, loss, 0.0), mask=mask_p)
    tl.store(grads_ptr + offs_p, tl.where(counts, grad_c * slope_c, 0.0), mask=mask_p)
    tl.store(grads_ptr + P + offs_p, tl.where(counts, grad_r * slope_r, 0.0), mask=mask_p)
    tl.store(grads_ptr + 2 * P + offs_p, tl.where(counts, plain_c, 0.0), mask=mask_p)
    tl.store(grads_ptr + 3 * P + offs_p, tl.where(counts, plain_r, 0.0), mask=mask_p)
    tl.store(grads_ptr + 4 * P + offs_p, tl.where(counts, grad_x, 0.0), mask=mask_p)
    tl.store(rewards_ptr + offs_p, parameters.beta * score_c, mask=mask_p)
    tl.store(rewards_ptr + P + offs_p, parameters.beta * score_r, mask=mask_p)
    tl.store(sums_ptr + offs_p, pc, mask=mask_p)
    tl.store(sums_ptr + P + offs_p, pr, mask=mask_p)


def preference_loss_fwd(
    chosen: Side, rejected: Side, response: Side | None, data: PairData, call: LossOptions
) -> Scored:
    """Return losses, rewards and slopes. Inputs are checked and on one device."""
    P, device = chosen.form.pairs, chosen.logps.device

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, P, dtype=dtype, device=device)

    L = len(call.losses)
    sorts = any(loss.kind == "ranked" for loss in call.losses)
    has_statistic = any(loss.kind == "statistic" for loss in call.losses)
    scored = Scored(
        losses=empty(),
        rewards=empty(2),
        sums=empty(2),
        grads=empty(len(GRAD_ROWS)),
        tails=None if call.ld_alpha is None else empty(2, dtype=torch.int64),
        ranks=empty(L, 2, dtype=torch.int32) if sorts else None,
        rank_grads=empty(L, 2) if sorts else None,
        stats=empty(L, 2) if has_statistic else None,
    )
    if P == 0:
        return scored
    sides = (chosen, rejected, response)
    has_tokens = any(side is not None and side.form.has_tokens for side in sides)
    block_p, block_t, num_warps = launch_shape(P, has_tokens, call.is_batch)
    pointers = [None if side is None else pointers_of(side) for side in sides]
    with device_guard(chosen.logps):
        _preference_loss_fwd_kernel[(cdiv(P, block_p),)](
            chosen=pointers[0],
            rejected=pointers[1],
            response=pointers[2],
            pair_weights_ptr=contiguous(data.weights),
            reward_chosen_ptr=contiguous(data.reward_chosen),
            reward_rejected_ptr=contiguous(data.reward_rejected),
            losses_ptr=scored.losses,
            rewards_ptr=scored.rewards,
            sums_ptr=scored.sums,
            grads_ptr=scored.grads,
            tails_ptr=scored.tails,
            ranks_ptr=scored.ranks,
            rank_grads_ptr=scored.rank_grads,
            stats_ptr=scored.stats,
            scratch_ptr=empty(3, SCRATCH_ROWS.value) if has_tokens and call.is_batch else None,
            P=P,
            ld_alpha=1.0 if call.ld_alpha is None else call.ld_alpha,
            divergence_power=-1.0 if call.divergence == "forward_kl" else call.divergence_power,
            parameters=call.parameters,
            weights=call.weights,
            terms=tuple(TERM_OF[loss.name] for loss in call.losses),
            KINDS=tuple(loss.kind for loss in call.losses),
            DIVERGENCE=_DIVERGENCE_ID[call.divergence],
            HAS_RESPONSE=response is not None,
            BLOCK_P=block_p,
            BLOCK_T=block_t,
            num_warps=num_warps,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=False,
        )
    return scored
