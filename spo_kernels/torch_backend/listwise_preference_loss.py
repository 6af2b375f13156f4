"""Torch backend of ``listwise_preference_loss``: the kernel's launcher in plain torch.

fp32 arithmetic, fp64 where an input is fp64. Nothing is read back to the host and no loop runs over
lists; products of matrices are elementwise, so no reduced-precision matmul setting reaches them.
"""

import math

import torch

from spo_kernels.calls.checks import compute_dtype
from spo_kernels.calls.loss_table import ListwiseParameters

SINKHORN_ITERATIONS = 50
_LN_2 = math.log(2.0)


def _comes_before(x, is_there):
    """[B, i, j]: whether j comes before i when x falls, the earlier of two equal ones first."""
    K = x.shape[1]
    offs = torch.arange(K, device=x.device)
    mine, other = x[:, :, None], x[:, None, :]
    is_first = offs[None, :] < offs[:, None]
    return ((other > mine) | ((other == mine) & is_first)) & is_there[:, None, :]


def _discount_by(x, is_there):
    """1 / log2(1 + rank) of each element, rank 1 for the largest."""
    return 1.0 / torch.log2(2.0 + _comes_before(x, is_there).sum(2).to(x.dtype))


def _gains(psi, is_there):
    """(2^psi - 1) / 2^top, top the largest label or 0: a ratio of gains cannot overflow."""
    top = psi.masked_fill(~is_there, 0.0).amax(1, keepdim=True).clamp(min=0.0)
    scale = torch.exp2(-top)
    small = torch.expm1(psi.clamp(max=1.0) * _LN_2) * scale
    gains = torch.where(psi < 1.0, small, torch.exp2(psi - top) - scale)
    return gains.masked_fill(~is_there, 0.0)


def _row_sums(matrix, vector):
    return (matrix * vector[:, None, :]).sum(2)


def _column_sums(matrix, vector):
    return (matrix * vector[:, :, None]).sum(1)


def _outer(rows, columns):
    return rows[:, :, None] * columns[:, None, :]


def _running_sums(matrix):
    """Sums over axis 1 up to each row; doubling, as a cumsum may be refused as not repeatable."""
    step = 1
    while step < matrix.shape[1]:
        later = matrix[:, step:] + matrix[:, :-step]
        matrix = torch.cat((matrix[:, :step], later), dim=1)
        step *= 2
    return matrix


def _neural_sort(y, is_there, mask_j, temperature):
    """P [B, j, i]: how much response i is the one of rank j."""
    offs = torch.arange(y.shape[1], device=y.device)[None, :, None]
    rank = _comes_before(y, is_there).sum(2)[:, None, :]
    is_own = (offs == rank) & is_there[:, None, :]
    ranked = torch.where(is_own, y[:, None, :], 0.0).sum(2)
    # below the row's maximum by 2 sum of |y_q - y_i| over the ranks q after i's up to j, less
    # |y_j - y_i|: sums of what is not negative, where the usual form subtracts large numbers
    apart = (ranked[:, :, None] - y[:, None, :]).abs().masked_fill(~mask_j[:, :, None], 0.0)
    above = _running_sums(torch.where(offs < rank, apart, 0.0).flip(1)).flip(1)
    below = _running_sums(torch.where(offs > rank, apart, 0.0))
    matrix = torch.exp((apart - 2.0 * (above + below)) / temperature)
    matrix = matrix.masked_fill(~(mask_j[:, :, None] & is_there[:, None, :]), 0.0)
    # the maximum itself adds 1
    return matrix / matrix.sum(2, keepdim=True).clamp(min=1.0)


def _neural_ndcg(y, psi, is_there, parameters):
    gains, idcg, counted = _gains_and_idcg(psi, is_there)
    n = is_there.sum(1, keepdim=True)
    offs = torch.arange(y.shape[1], device=y.device)
    mask_j = offs < n
    matrix = _neural_sort(y, is_there, mask_j, parameters.ndcg_temperature)

    # no sum is 0: a column holds a row's maximum, which is 1 / n or more
    r = mask_j.to(y.dtype)
    rounds = []
    for _ in range(SINKHORN_ITERATIONS):
        before = r
        c = (1.0 / _column_sums(matrix, r)).masked_fill(~is_there, 0.0)
        r = (1.0 / _row_sums(matrix, c)).masked_fill(~mask_j, 0.0)
        rounds.append((before, c, r))
    discount = (1.0 / torch.log2(2.0 + offs.to(y.dtype))) * mask_j
    gained = _row_sums(matrix, c * gains)
    ndcg = (discount * r * gained).sum(1) / idcg

    # of the loss, -ndcg; rows add up to 1, so gains from their mean have the same gradient
    weight = -discount / idcg[:, None]
    gains = (gains - gains.sum(1, keepdim=True) / n.clamp(min=1)).masked_fill(~is_there, 0.0)
    grad_matrix = _outer(weight * r, c * gains)
    grad_r = weight * _row_sums(matrix, c * gains)
    grad_c = gains * _column_sums(matrix, weight * r)
    for before, c, r in reversed(rounds):
        grad_row_sum = -grad_r * r * r
        grad_column_sum = -(grad_c + _column_sums(matrix, grad_row_sum)) * c * c
        grad_matrix = grad_matrix + _outer(grad_row_sum, c) + _outer(before, grad_column_sum)
        grad_r = _row_sums(matrix, grad_column_sum)
        grad_c = 0.0

    # of scores [j, i] = (n + 1 - 2 j) y_i - sum_l |y_i - y_l|, up to one constant a row
    row_dot = (matrix * grad_matrix).sum(2, keepdim=True)
    grad_scores = matrix * (grad_matrix - row_dot) / parameters.ndcg_temperature
    # [l, i]: sign of y_i - y_l
    sign = torch.sign(y[:, None, :] - y[:, :, None]).masked_fill(~is_there[:, :, None], 0.0)
    slope = (n - 1 - 2 * offs).to(y.dtype)[:, :, None] - sign.sum(1, keepdim=True)
    grad_y = (grad_scores * slope).sum(1) - _column_sums(sign, grad_scores.sum(1))
    return -ndcg, grad_y, counted


def _approx_ndcg(y, psi, is_there, parameters):
    gains, idcg, counted = _gains_and_idcg(psi, is_there)
    steps = parameters.ndcg_alpha * (y[:, None, :] - y[:, :, None])
    is_other = is_there[:, None, :] & ~torch.eye(y.shape[1], dtype=torch.bool, device=y.device)
    above = torch.sigmoid(steps)
    slope = above * torch.sigmoid(-steps)
    position = 1.0 + above.masked_fill(~is_other, 0.0).sum(2)
    discount = 1.0 / torch.log2(1.0 + position)
    gains = gains / idcg[:, None]
    grad_position = gains * discount * discount / ((1.0 + position) * _LN_2)
    moved = slope * (grad_position[:, None, :] - grad_position[:, :, None])
    grad_y = parameters.ndcg_alpha * moved.masked_fill(~is_other, 0.0).sum(2)
    return -(gains * discount).sum(1), grad_y, counted


def _gains_and_idcg(psi, is_there):
    gains = _gains(psi, is_there)
    idcg = (gains * _discount_by(psi, is_there)).sum(1)
    counted = (idcg > 0.0) & (is_there.sum(1) > 1)
    return gains, torch.where(counted, idcg, 1.0), counted


def _list_mle(y, psi, is_there, parameters):
    # [i, j]: j comes after i
    not_after = _comes_before(psi, is_there) | ~is_there[:, None, :] | ~is_there[:, :, None]
    not_after = not_after | torch.eye(y.shape[1], dtype=torch.bool, device=y.device)
    ahead = (y[:, None, :] - y[:, :, None]).masked_fill(not_after, -torch.inf)
    top = ahead.amax(2).clamp(min=0.0)
    exps = torch.exp(ahead - top[:, :, None])
    others, own = exps.sum(2), torch.exp(-top)
    losses = top + torch.log1p(torch.where(top > 0.0, others + own - 1.0, others))
    shares = exps / (others + own)[:, :, None]
    return losses.sum(1), shares.sum(1) - shares.sum(2), is_there.sum(1) > 1


def _lipo_lambda(y, psi, is_there, parameters):
    is_pair = _ordered_pairs(psi, is_there)
    discount = _discount_by(y, is_there)
    weights = (discount[:, :, None] - discount[:, None, :]).abs()
    fallen = torch.expm1((psi[:, None, :] - psi[:, :, None]) * _LN_2)
    weights = weights * -torch.exp2(psi)[:, :, None] * fallen
    return _pairwise(y, weights.masked_fill(~is_pair, 0.0), is_pair)


def _all_pairs(y, psi, is_there, parameters):
    return _mean_of_pairs(y, _ordered_pairs(psi, is_there))


def _best_vs_rest(y, psi, is_there, parameters):
    is_best = ~_comes_before(psi, is_there).any(2)
    return _mean_of_pairs(y, _ordered_pairs(psi, is_there) & is_best[:, :, None])


def _ordered_pairs(psi, is_there):
    return (psi[:, :, None] > psi[:, None, :]) & is_there[:, :, None] & is_there[:, None, :]


def _mean_of_pairs(y, is_pair):
    weights = is_pair.to(y.dtype)
    return _pairwise(y, weights / weights.sum((1, 2), keepdim=True).clamp(min=1.0), is_pair)


def _pairwise(y, weights, is_pair):
    """The sum over [i, j] of weights * log(1 + exp(y_j - y_i)) and its gradient."""
    behind = y[:, None, :] - y[:, :, None]
    pulls = weights * torch.sigmoid(behind)
    losses = (weights * -torch.nn.functional.logsigmoid(-behind)).sum((1, 2))
    return losses, pulls.sum(1) - pulls.sum(2), is_pair.any(2).any(1)


# each returns (loss, dloss / dy, whether it counts) of all lists
LOSS_OF = {
    "neural_ndcg": _neural_ndcg,
    "approx_ndcg": _approx_ndcg,
    "lipo_lambda": _lipo_lambda,
    "list_mle": _list_mle,
    "all_pairs": _all_pairs,
    "best_vs_rest": _best_vs_rest,
}


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
    dtype = compute_dtype(logps, ref_logps, labels)
    is_there = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask
    score, psi = logps.to(dtype), labels.to(dtype)
    if ref_logps is not None:
        score = score - ref_logps.to(dtype)
    rewards = (parameters.beta * score).masked_fill(~is_there, 0.0)
    psi = psi.masked_fill(~is_there, 0.0)

    # a score or a label that is not finite spoils its list: set aside here, put back at the end
    is_bad = ~(rewards.isfinite() & psi.isfinite())
    y, psi = rewards.masked_fill(is_bad, 0.0), psi.masked_fill(is_bad, 0.0)
    losses, grads, counted = LOSS_OF[loss_type](y, psi, is_there, parameters)

    spoiled = torch.where(is_bad.any(1), torch.nan, 0.0).to(dtype)
    losses = losses.masked_fill(~counted, 0.0) + spoiled
    grads = parameters.beta * grads.masked_fill(~counted[:, None], 0.0) + spoiled[:, None]
    return losses, grads.masked_fill(~is_there, 0.0), rewards, counted | is_bad.any(1)
