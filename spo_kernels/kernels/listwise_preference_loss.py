"""Listwise preference losses and their gradients on the log-probs of K responses a prompt.

    y[b, k] = beta * (logps - ref_logps)[b, k]      psi[b, k] = label of the response
    loss[b] = loss_type(y[b], psi[b])               grads[b, k] = dloss / dlogps
    rewards = y                                     counted[b] = whether the list has a loss

Symbols: B lists, K responses, n of them there. One program owns one list; its [K, K] matrices
never leave it; all arithmetic is fp32. The formulas are in ``loss_table.py``; each has the function
of its name here, which the kernel is handed and compiled for. It returns (loss, dloss / dy, whether
the list counts); for a list that does not count the first two are finite, and dropped.

NeuralNDCG's Sinkhorn matrix after t rounds is diag(r_t) P diag(c_t), so the forward keeps the
vectors only, c_t = 1 / (P^T r_(t-1)) and r_t = 1 / (P c_t), and the backward replays them exactly.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from spo_kernels.calls.loss_table import ListwiseParameters
from spo_kernels.kernels.device import device_guard
from spo_kernels.kernels.scalar_math import (
    expm1,
    log1p,
    sigmoid_and_slope,
    softplus_and_sigmoid,
)

# least BLOCK_K; larger lists take the next power of two
MIN_BLOCK_K = 16
# as many as keep the [K, K] tiles of NeuralNDCG in registers on every architecture
NUM_WARPS = {16: 1, 32: 4, 64: 16}
SINKHORN_ITERATIONS = 50
SCALINGS = 2 * SINKHORN_ITERATIONS + 1

_ITERATIONS = tl.constexpr(SINKHORN_ITERATIONS)
_SCALINGS = tl.constexpr(SCALINGS)
_LN_2 = tl.constexpr(0.6931471805599453)


class Responses(NamedTuple):
    """``[BLOCK_K]`` values of one list's responses, finite everywhere."""

    y: Any
    psi: Any
    is_there: Any
    offs_k: Any
    n: Any  # responses there
    scalings_ptr: Any  # [SCALINGS, BLOCK_K] fp32, the list's own scratch, or None


@triton.jit
def _comes_before(x, is_there, offs_k):
    """[i, j]: whether j comes before i when x falls, the earlier of two equal ones first."""
    is_first = offs_k[None, :] < offs_k[:, None]
    is_above = (x[None, :] > x[:, None]) | ((x[None, :] == x[:, None]) & is_first)
    return is_above & is_there[None, :]


@triton.jit
def _discount_by(x, is_there, offs_k):
    """1 / log2(1 + rank) of each element, rank 1 for the largest."""
    rank = 1.0 + tl.sum(_comes_before(x, is_there, offs_k).to(tl.float32), axis=1)
    return 1.0 / tl.log2(1.0 + rank)


@triton.jit
def _gains(psi, is_there):
    """(2^psi - 1) / 2^top, top the largest label or 0: a ratio of gains cannot overflow."""
    top = tl.max(tl.where(is_there, psi, 0.0), axis=0)
    scale = tl.exp2(-top)
    small = expm1(tl.minimum(psi, 1.0) * _LN_2) * scale
    return tl.where(is_there, tl.where(psi < 1.0, small, tl.exp2(psi - top) - scale), 0.0)


@triton.jit
def _gains_and_idcg(responses):
    """Gains, their best DCG, and whether there is one: where not, the DCG is 1."""
    gains = _gains(responses.psi, responses.is_there)
    discount = _discount_by(responses.psi, responses.is_there, responses.offs_k)
    idcg = tl.sum(gains * discount, axis=0)
    counts = (idcg > 0.0) & (responses.n > 1)
    return gains, tl.where(counts, idcg, 1.0), counts


@triton.jit
def _neural_sort(y, is_there, offs_k, mask_j, temperature):
    """P [j, i]: how much response i is the one of rank j."""
    rank = tl.sum(_comes_before(y, is_there, offs_k).to(tl.int32), axis=1)
    is_own = (offs_k[:, None] == rank[None, :]) & is_there[None, :]
    ranked = tl.sum(tl.where(is_own, y[None, :], 0.0), axis=1)
    # below the row's maximum by 2 sum of |y_q - y_i| over the ranks q after i's up to j, less
    # |y_j - y_i|: sums of what is not negative, where the usual form subtracts large numbers
    apart = tl.where(mask_j[:, None], tl.abs(ranked[:, None] - y[None, :]), 0.0)
    above = tl.cumsum(tl.where(offs_k[:, None] < rank[None, :], apart, 0.0), axis=0, reverse=True)
    below = tl.cumsum(tl.where(offs_k[:, None] > rank[None, :], apart, 0.0), axis=0)
    matrix = tl.exp((apart - 2.0 * (above + below)) / temperature)
    matrix = tl.where(mask_j[:, None] & is_there[None, :], matrix, 0.0)
    # the maximum itself adds 1
    return matrix / tl.maximum(tl.sum(matrix, axis=1), 1.0)[:, None]


@triton.jit
def neural_ndcg(responses, parameters):
    y, is_there, offs_k = responses.y, responses.is_there, responses.offs_k
    n, scalings_ptr = responses.n, responses.scalings_ptr
    BLOCK_K: tl.constexpr = y.shape[0]
    temperature = parameters.ndcg_temperature
    gains, idcg, counts = _gains_and_idcg(responses)
    # rank j is axis 0, response i is axis 1
    mask_j = offs_k < n
    matrix = _neural_sort(y, is_there, offs_k, mask_j, temperature)

    # no sum is 0: a column holds a row's maximum, which is 1 / n or more
    c = tl.where(is_there, 1.0, 0.0)
    r = tl.where(mask_j, 1.0, 0.0)
    tl.store(scalings_ptr + offs_k, r)
    for t in range(0, _ITERATIONS):
        c = tl.where(is_there, 1.0 / tl.sum(matrix * r[:, None], axis=0), 0.0)
        r = tl.where(mask_j, 1.0 / tl.sum(matrix * c[None, :], axis=1), 0.0)
        tl.store(scalings_ptr + (2 * t + 1) * BLOCK_K + offs_k, c)
        tl.store(scalings_ptr + (2 * t + 2) * BLOCK_K + offs_k, r)
    discount = tl.where(mask_j, 1.0 / tl.log2(2.0 + offs_k.to(tl.float32)), 0.0)
    gained = tl.sum(matrix * (c * gains)[None, :], axis=1)
    ndcg = tl.sum(discount * r * gained, axis=0) / idcg

    # of the loss, -ndcg; rows add up to 1, so gains from their mean have the same gradient
    weight = -discount / idcg
    mean_gain = tl.sum(gains, axis=0) / tl.maximum(n, 1).to(tl.float32)
    gains = tl.where(is_there, gains - mean_gain, 0.0)
    grad_matrix = (weight * r)[:, None] * (c * gains)[None, :]
    grad_r = weight * tl.sum(matrix * (c * gains)[None, :], axis=1)
    grad_c = gains * tl.sum(matrix * (weight * r)[:, None], axis=0)
    # the vectors are read by other threads than wrote them
    tl.debug_barrier()
    for step in range(0, _ITERATIONS):
        t = _ITERATIONS - 1 - step
        c = tl.load(scalings_ptr + (2 * t + 1) * BLOCK_K + offs_k)
        before = tl.load(scalings_ptr + (2 * t) * BLOCK_K + offs_k)
        grad_row_sum = -grad_r * r * r
        grad_c += tl.sum(matrix * grad_row_sum[:, None], axis=0)
        grad_column_sum = -grad_c * c * c
        grad_matrix += grad_row_sum[:, None] * c[None, :]
        grad_matrix += before[:, None] * grad_column_sum[None, :]
        grad_r = tl.sum(matrix * grad_column_sum[None, :], axis=1)
        grad_c = tl.zeros_like(grad_c)
        r = before

    # of scores [j, i] = (n + 1 - 2 j) y_i - sum_l |y_i - y_l|, up to one constant a row
    row_dot = tl.sum(matrix * grad_matrix, axis=1)
    grad_scores = matrix * (grad_matrix - row_dot[:, None]) / temperature
    # [l, i]: sign of y_i - y_l
    sign = (y[None, :] > y[:, None]).to(tl.float32) - (y[None, :] < y[:, None]).to(tl.float32)
    sign = tl.where(is_there[:, None], sign, 0.0)
    slope = (n - 1 - 2 * offs_k).to(tl.float32)[:, None] - tl.sum(sign, axis=0)[None, :]
    through_others = tl.sum(sign * tl.sum(grad_scores, axis=0)[:, None], axis=0)
    return -ndcg, tl.sum(grad_scores * slope, axis=0) - through_others, counts


@triton.jit
def approx_ndcg(responses, parameters):
    y, is_there, offs_k = responses.y, responses.is_there, responses.offs_k
    alpha = parameters.ndcg_alpha
    gains, idcg, counts = _gains_and_idcg(responses)
    above, slope = sigmoid_and_slope(alpha * (y[None, :] - y[:, None]))
    is_other = is_there[None, :] & (offs_k[None, :] != offs_k[:, None])
    position = 1.0 + tl.sum(tl.where(is_other, above, 0.0), axis=1)
    discount = 1.0 / tl.log2(1.0 + position)
    gains = gains / idcg
    # dloss / dposition
    grad_position = gains * discount * discount / ((1.0 + position) * _LN_2)
    moved = tl.where(is_other, slope * (grad_position[None, :] - grad_position[:, None]), 0.0)
    return -tl.sum(gains * discount, axis=0), alpha * tl.sum(moved, axis=1), counts


@triton.jit
def list_mle(responses, parameters):
    y, psi = responses.y, responses.psi
    is_there, offs_k = responses.is_there, responses.offs_k
    # [i, j]: j comes after i, and its share of i's softmax
    is_after = _comes_before(psi, is_there, offs_k) | (offs_k[None, :] == offs_k[:, None])
    is_after = ~is_after & is_there[None, :] & is_there[:, None]
    ahead = tl.where(is_after, y[None, :] - y[:, None], float("-inf"))
    top = tl.maximum(tl.max(ahead, axis=1), 0.0)
    exps = tl.exp(ahead - top[:, None])
    others = tl.sum(exps, axis=1)
    own = tl.exp(-top)
    losses = top + log1p(tl.where(top > 0.0, others + own - 1.0, others))
    shares = exps / (others + own)[:, None]
    grad_y = tl.sum(shares, axis=0) - tl.sum(shares, axis=1)
    return tl.sum(losses, axis=0), grad_y, responses.n > 1


@triton.jit
def _ordered_pairs(responses):
    """[i, j]: whether both are there and i has the larger label."""
    psi, is_there = responses.psi, responses.is_there
    return (psi[:, None] > psi[None, :]) & is_there[:, None] & is_there[None, :]


@triton.jit
def _count_of(is_pair):
    return tl.sum(tl.sum(is_pair.to(tl.float32), axis=1), axis=0)


@triton.jit
def _mean_weights(is_pair):
    share = 1.0 / tl.maximum(_count_of(is_pair), 1.0)
    return tl.zeros_like(is_pair.to(tl.float32)) + share


@triton.jit
def _pairwise(y, weights, is_pair):
    # the sum over pairs [i, j] of weights * sp(-(y_i - y_j))
    weights = tl.where(is_pair, weights, 0.0)
    softplus, sigmoid = softplus_and_sigmoid(y[None, :] - y[:, None])
    loss = tl.sum(tl.sum(weights * softplus, axis=1), axis=0)
    pulls = weights * sigmoid
    return loss, tl.sum(pulls, axis=0) - tl.sum(pulls, axis=1), _count_of(is_pair) > 0.0


@triton.jit
def lipo_lambda(responses, parameters):
    is_pair = _ordered_pairs(responses)
    psi = responses.psi
    discount = _discount_by(responses.y, responses.is_there, responses.offs_k)
    # the difference of the gains is that of the powers, and the larger power is at least it
    power = tl.exp2(psi)
    weights = tl.abs(discount[:, None] - discount[None, :])
    weights = weights * -power[:, None] * expm1((psi[None, :] - psi[:, None]) * _LN_2)
    return _pairwise(responses.y, weights, is_pair)


@triton.jit
def all_pairs(responses, parameters):
    is_pair = _ordered_pairs(responses)
    return _pairwise(responses.y, _mean_weights(is_pair), is_pair)


@triton.jit
def best_vs_rest(responses, parameters):
    before = _comes_before(responses.psi, responses.is_there, responses.offs_k)
    is_best = tl.sum(before.to(tl.float32), axis=1) == 0.0
    is_pair = _ordered_pairs(responses) & is_best[:, None]
    return _pairwise(responses.y, _mean_weights(is_pair), is_pair)


LOSS_OF = {
    "neural_ndcg": neural_ndcg,
    "approx_ndcg": approx_ndcg,
    "list_mle": list_mle,
    "lipo_lambda": lipo_lambda,
    "all_pairs": all_pairs,
    "best_vs_rest": best_vs_rest,
}


@triton.jit
def _listwise_preference_loss_fwd_kernel(
    logps_ptr,  # [B, K]
    ref_logps_ptr,  # [B, K], read if HAS_REF
    labels_ptr,  # [B, K]
    mask_ptr,  # [B, K] bool, read if HAS_MASK
    scalings_ptr,  # [B, SCALINGS, BLOCK_K] fp32, scratch of neural_ndcg: r_0, c_1, r_1, c_2, ...
    losses_ptr,  # [B] fp32, out
    grads_ptr,  # [B, K] fp32, out: dloss / dlogps
    rewards_ptr,  # [B, K] fp32, out
    counted_ptr,  # [B] bool, out
    K,
    parameters,  # ListwiseParameters of fp32
    HAS_REF: tl.constexpr,
    HAS_MASK: tl.constexpr,
    LOSS: tl.constexpr,  # jit function of the loss type
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    offs = row * K + offs_k

    # [BLOCK_K]
    is_there = mask_k
    if HAS_MASK:
        is_there = mask_k & (tl.load(mask_ptr + offs, mask=mask_k, other=0) != 0)
    score = tl.load(logps_ptr + offs, mask=is_there, other=0.0).to(tl.float32)
    if HAS_REF:
        score -= tl.load(ref_logps_ptr + offs, mask=is_there, other=0.0).to(tl.float32)
    psi = tl.load(labels_ptr + offs, mask=is_there, other=0.0).to(tl.float32)
    reward = parameters.beta * score
    tl.store(rewards_ptr + offs, reward, mask=mask_k)

    # a score or a label that is not finite spoils its list: set aside here, put back at the end
    is_bad = (reward - reward != 0.0) | (psi - psi != 0.0)
    bad = tl.sum(is_bad.to(tl.int32), axis=0)
    n = tl.sum(is_there.to(tl.int32), axis=0)
    y = tl.where(is_bad, 0.0, reward)
    psi = tl.where(is_bad, 0.0, psi)

    if scalings_ptr is not None:
        scalings_ptr += row * (_SCALINGS * BLOCK_K)
    responses = Responses(
        y=y, psi=psi, is_there=is_there, offs_k=offs_k, n=n, scalings_ptr=scalings_ptr
    )
    loss, grad_y, counts = LOSS(responses, parameters)

    spoiled = tl.where(bad > 0, float("nan"), 0.0)
    share = tl.where(counts, 1.0, 0.0)
    grad = tl.where(is_there, parameters.beta * share * grad_y + spoiled, 0.0)
    tl.store(grads_ptr + offs, grad, mask=mask_k)
    tl.store(losses_ptr + row, share * loss + spoiled)
    tl.store(counted_ptr + row, counts | (bad > 0))


def listwise_preference_loss_fwd(
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    loss_type: str,
    parameters: ListwiseParameters,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (losses [B], grads [B, K], rewards [B, K], counted [B]). Inputs are checked."""
    B, K = logps.shape
    block_k = max(MIN_BLOCK_K, triton.next_power_of_2(K))
    keeps_scalings = loss_type == "neural_ndcg"

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=logps.device)

    losses, counted = empty(B), empty(B, dtype=torch.bool)
    grads, rewards = empty(B, K), empty(B, K)
    if B == 0:
        return losses, grads, rewards, counted
    with device_guard(logps):
        _listwise_preference_loss_fwd_kernel[(B,)](
            logps_ptr=logps.contiguous(),
            ref_logps_ptr=None if ref_logps is None else ref_logps.contiguous(),
            labels_ptr=labels.contiguous(),
            mask_ptr=None if mask is None else mask.contiguous(),
            scalings_ptr=empty(B, SCALINGS, block_k) if keeps_scalings else None,
            losses_ptr=losses,
            grads_ptr=grads,
            rewards_ptr=rewards,
            counted_ptr=counted,
            K=K,
            parameters=parameters,
            HAS_REF=ref_logps is not None,
            HAS_MASK=mask is not None,
            LOSS=LOSS_OF[loss_type],
            BLOCK_K=block_k,
            num_warps=NUM_WARPS[block_k],
            enable_fp_fusion=False,
        )
    return losses, grads, rewards, counted
