"""The loss types of ``preference_loss`` as triton functions of ``[BLOCK_P]`` values.

Each type is the function of its row's name in ``loss_table.py``, which has the formulas and the
symbols; all arithmetic is fp32. By the row's ``kind`` a function returns
    pair, policy   (loss, slope of chosen, slope of rejected)
    statistic      (loss, slope of chosen, slope of rejected, dloss / dstatistic, dstatistic / dm)
    ranked         (loss of each rank, its slope, lane of chosen at each rank, lane of rejected)
    response       (loss, slope of the third response)

The kernel is handed a plain tuple of these functions, as it is handed any tuple of arguments.
Triton 3.6 and 3.9 (tried in November 2026, interpreted and compiled) take each member for a
constexpr of its own and put its source into the key of the compiled kernel. Annotated as
``tl.constexpr`` the tuple would compile too, but count with its repr in the key of the cache on
disk: an edited function would be served the kernel of its former body.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from spo_kernels.kernels.scalar_math import (
    expm1,
    log1p,
    sigmoid_and_slope,
    softplus_and_sigmoid,
    tanh_half,
)

LARGEST_EXPONENT = tl.constexpr(80.0)
_ORPO_LARGEST_LOGP = tl.constexpr(-1e-7)
_LOG_2 = tl.constexpr(0.6931471805599453)
# AQL, AQFL and DBAQL measure margins in units of this
_QUANTILE_TAU = tl.constexpr(0.05)
_BISECTIONS = tl.constexpr(40)


class Pair(NamedTuple):
    """``[BLOCK_P]`` fp32 values of the pairs; fields no selected loss reads are undefined."""

    c: Any
    r: Any
    pc: Any
    pr: Any
    ratio: Any
    ref_ratio: Any
    len_c: Any
    len_r: Any
    x: Any
    px: Any
    reward_c: Any
    reward_r: Any
    # P over the tokens of the batch: chosen, chosen and rejected, third responses
    share_c: Any
    share_cr: Any
    share_x: Any
    # which lanes hold pairs, and how many there are
    mask: Any
    P: Any


@triton.jit
def _margin(pair, parameters):
    return parameters.beta * (pair.c - pair.r)


@triton.jit
def _of_margin(loss, slope, beta):
    # a function of m = beta (c - r) from its slope in m
    return loss, beta * slope, -(beta * slope)


@triton.jit
def _smoothed(m, eps, flip):
    # (1 - eps) sp(-m) + flip sp(m)
    down, lost = softplus_and_sigmoid(-m)
    up, kept = softplus_and_sigmoid(m)
    return (1.0 - eps) * down + flip * up, flip * kept - (1.0 - eps) * lost


@triton.jit
def _hinge_of(m):
    slack = 1.0 - m
    # not maximum(): it would turn a NaN into 0; no gradient at the kink itself, like relu
    return tl.where(slack <= 0.0, 0.0, slack), tl.where(slack <= 0.0, 0.0, -1.0)


@triton.jit
def sigmoid(pair, parameters):
    loss, lost = softplus_and_sigmoid(-_margin(pair, parameters))
    return _of_margin(loss, -lost, parameters.beta)


@triton.jit
def hinge(pair, parameters):
    loss, slope = _hinge_of(_margin(pair, parameters))
    return _of_margin(loss, slope, parameters.beta)


@triton.jit
def ipo(pair, parameters):
    error = pair.c / pair.len_c - pair.r / pair.len_r - 0.5 / parameters.beta
    return error * error, 2.0 * error / pair.len_c, -2.0 * error / pair.len_r


@triton.jit
def exo_pair(pair, parameters):
    m, eps = _margin(pair, parameters), parameters.label_smoothing
    log_kept, log_flipped = log1p(-eps), tl.log(eps)
    down, q = softplus_and_sigmoid(-m)
    up, p = softplus_and_sigmoid(m)
    loss = q * (-up - log_flipped) - p * (down + log_kept)
    return _of_margin(loss, p * q * (m - log_kept + log_flipped), parameters.beta)


@triton.jit
def nca_pair(pair, parameters):
    beta = parameters.beta
    down_u, lost_u = softplus_and_sigmoid(-(beta * pair.c))
    up_u, kept_u = softplus_and_sigmoid(beta * pair.c)
    up_v, kept_v = softplus_and_sigmoid(beta * pair.r)
    loss = down_u + 0.5 * up_u + 0.5 * up_v
    return loss, beta * (0.5 * kept_u - lost_u), 0.5 * beta * kept_v


@triton.jit
def robust(pair, parameters):
    eps = parameters.label_smoothing
    loss, slope = _smoothed(_margin(pair, parameters), eps, -eps)
    scale = 1.0 / (1.0 - 2.0 * eps)
    return _of_margin(loss * scale, slope * scale, parameters.beta)


@triton.jit
def bco_pair(pair, parameters):
    beta = parameters.beta
    down_u, lost_u = softplus_and_sigmoid(-(beta * pair.c))
    up_v, kept_v = softplus_and_sigmoid(beta * pair.r)
    return down_u + up_v, -(beta * lost_u), beta * kept_v


@triton.jit
def sppo_hard(pair, parameters):
    half = 0.5 / parameters.beta
    error_c, error_r = pair.c - half, pair.r + half
    return error_c * error_c + error_r * error_r, 2.0 * error_c, 2.0 * error_r


@triton.jit
def apo_zero(pair, parameters):
    beta = parameters.beta
    lost_u, slope_u = sigmoid_and_slope(-(beta * pair.c))
    kept_v, slope_v = sigmoid_and_slope(beta * pair.r)
    return lost_u + kept_v, -(beta * slope_u), beta * slope_v


@triton.jit
def apo_down(pair, parameters):
    beta, m = parameters.beta, _margin(pair, parameters)
    u = beta * pair.c
    kept_u, slope_u = sigmoid_and_slope(u)
    lost_m, slope_m = sigmoid_and_slope(-m)
    # the slopes are (1 - tanh^2) / 4: near 0 their difference must not cancel
    tanh_u, tanh_m = tanh_half(u), tanh_half(m)
    near = 0.25 * (tanh_m - tanh_u) * (tanh_m + tanh_u)
    difference = tl.where(tl.maximum(tl.abs(u), tl.abs(m)) < 1.0, near, slope_u - slope_m)
    return kept_u + lost_m, beta * difference, beta * slope_m


@triton.jit
def discopop(pair, parameters):
    m, tau = _margin(pair, parameters), parameters.discopop_tau
    logistic, lost = softplus_and_sigmoid(-m)
    down, rest = softplus_and_sigmoid(-m / tau)
    _, blend = softplus_and_sigmoid(m / tau)
    # far below 0 the product would be 0 * inf, elsewhere it is the more exact
    exponential = tl.where(m < -LARGEST_EXPONENT, tl.exp(-down - m), blend * tl.exp(-m))
    slope = rest / tau * (exponential - blend * logistic) - rest * lost - exponential
    return _of_margin(rest * logistic + exponential, slope, parameters.beta)


@triton.jit
def sigmoid_norm(pair, parameters):
    m = parameters.beta * (pair.c / pair.len_c - pair.r / pair.len_r)
    loss, lost = softplus_and_sigmoid(-m)
    slope = -(parameters.beta * lost)
    return loss, slope / pair.len_c, -slope / pair.len_r


@triton.jit
def cpo(pair, parameters):
    eps = parameters.label_smoothing
    loss, slope = _smoothed(_margin(pair, parameters), eps, eps)
    return _of_margin(loss, slope, parameters.beta)


@triton.jit
def cell(pair, parameters):
    m = _margin(pair, parameters)
    logistic, lost = softplus_and_sigmoid(-m)
    exponential = 0.5 * tl.exp(-m)
    return _of_margin(exponential + 0.5 * logistic, -exponential - 0.5 * lost, parameters.beta)


@triton.jit
def padll(pair, parameters):
    m = _margin(pair, parameters)
    logistic, lost = softplus_and_sigmoid(-m)
    decay = tl.where(m < 0.0, 0.45, 0.9)
    return _of_margin(decay * logistic, -(decay * lost), parameters.beta)


@triton.jit
def pfl(pair, parameters):
    m = _margin(pair, parameters)
    logistic, lost = softplus_and_sigmoid(-m)
    slack, slack_slope = _hinge_of(m)
    is_right = pair.pc > pair.pr
    loss = tl.where(is_right, 0.5 * logistic, 2.0 * slack)
    return _of_margin(loss, tl.where(is_right, -0.5 * lost, 2.0 * slack_slope), parameters.beta)


@triton.jit
def ada_dpo(pair, parameters):
    m = _margin(pair, parameters)
    tau = tl.abs(m) * parameters.ada_inverse_root
    tau = tl.minimum(tl.maximum(tau, parameters.ada_tau_min), parameters.ada_tau_max)
    logistic, lost = softplus_and_sigmoid(-m / tau)
    loss = tau * (logistic + parameters.ada_rho - _LOG_2)
    return _of_margin(loss, -lost, parameters.beta)


@triton.jit
def ada_dpo_quadratic(pair, parameters):
    m, rho = _margin(pair, parameters), parameters.ada_rho
    # from here on the price outweighs what any temperature gains
    largest = tl.minimum(parameters.ada_tau_max, _LOG_2 / (2.0 * rho))
    largest = tl.maximum(parameters.ada_tau_min, largest)
    low = tl.zeros_like(m) + parameters.ada_tau_min
    high = tl.zeros_like(m) + largest
    for _ in range(_BISECTIONS):
        tau = 0.5 * (low + high)
        v = tl.abs(m) / tau
        up, kept = softplus_and_sigmoid(v)
        # dloss / dtau: the entropy of s(v), which grows with tau
        is_falling = up - v * kept - _LOG_2 + 2.0 * rho * tau < 0.0
        low = tl.where(is_falling, tau, low)
        high = tl.where(is_falling, high, tau)
    tau = 0.5 * (low + high)
    logistic, lost = softplus_and_sigmoid(-m / tau)
    return _of_margin(tau * (logistic + rho * tau - _LOG_2), -lost, parameters.beta)


@triton.jit
def dual_clip(pair, parameters):
    beta = parameters.beta
    u, v = beta * pair.c, beta * pair.r
    is_cut_c, is_cut_r = u > parameters.clip_chosen, v < -parameters.clip_rejected
    u = tl.where(is_cut_c, parameters.clip_chosen, u)
    v = tl.where(is_cut_r, -parameters.clip_rejected, v)
    loss, lost = softplus_and_sigmoid(v - u)
    slope = beta * lost
    return loss, tl.where(is_cut_c, 0.0, -slope), tl.where(is_cut_r, 0.0, slope)


@triton.jit
def sft(pair, parameters):
    slope = tl.zeros_like(pair.pc) - pair.share_c
    return slope * pair.pc, slope, tl.zeros_like(slope)


@triton.jit
def rpo(pair, parameters):
    zero = tl.zeros_like(pair.pc)
    return -pair.pc, zero - 1.0, zero


@triton.jit
def rpo_mean(pair, parameters):
    slope = -1.0 / pair.len_c
    return slope * pair.pc, slope, tl.zeros_like(slope)


@triton.jit
def _normalized(pair, parameters, reward_c, slope_c, reward_r, slope_r):
    # a SimPO loss of the two rewards, given their slopes in the log-prob per token
    beta, eps = parameters.beta, parameters.label_smoothing
    loss, slope = _smoothed(beta * (reward_c - reward_r) - parameters.simpo_gamma, eps, eps)
    slope = beta * slope
    return loss, slope * slope_c / pair.len_c, -(slope * slope_r) / pair.len_r


@triton.jit
def simpo(pair, parameters):
    mean_c, mean_r = pair.pc / pair.len_c, pair.pr / pair.len_r
    return _normalized(pair, parameters, mean_c, 1.0, mean_r, 1.0)


@triton.jit
def _bent(logp, alpha):
    exponent = -(alpha * logp)
    is_cut = exponent > LARGEST_EXPONENT
    cut = tl.where(is_cut, LARGEST_EXPONENT, exponent)
    # alpha 0 is the limit, the log-prob itself
    is_flat = alpha == 0.0
    reward = tl.where(is_flat, logp, -expm1(cut) / tl.where(is_flat, 1.0, alpha))
    return reward, tl.where(is_cut, 0.0, tl.exp(cut))


@triton.jit
def alphapo(pair, parameters):
    reward_c, slope_c = _bent(pair.pc / pair.len_c, parameters.alphapo_alpha)
    reward_r, slope_r = _bent(pair.pr / pair.len_r, parameters.alphapo_alpha)
    return _normalized(pair, parameters, reward_c, slope_c, reward_r, slope_r)


@triton.jit
def _log_odds(logp):
    is_cut = logp > _ORPO_LARGEST_LOGP
    logp = tl.where(is_cut, _ORPO_LARGEST_LOGP, logp)
    # 1 - exp(t) without cancellation, and finite at t = 0
    rest = -expm1(logp)
    return logp - tl.log(rest), tl.where(is_cut, 0.0, 1.0 / rest)


@triton.jit
def orpo(pair, parameters):
    odds_c, slope_c = _log_odds(pair.pc / pair.len_c)
    odds_r, slope_r = _log_odds(pair.pr / pair.len_r)
    loss, lost = softplus_and_sigmoid(odds_r - odds_c)
    slope = -(parameters.beta * lost)
    grad_c, grad_r = slope * slope_c / pair.len_c, -(slope * slope_r) / pair.len_r
    return parameters.beta * loss, grad_c, grad_r


@triton.jit
def _reward_weight(reward, parameters):
    weight = tl.exp(reward / parameters.rwr_temperature)
    # not minimum(): it would turn a NaN into the largest weight
    return tl.where(weight > parameters.rwr_max_weight, parameters.rwr_max_weight, weight)


@triton.jit
def rwr(pair, parameters):
    slope_c = -(pair.share_cr * _reward_weight(pair.reward_c, parameters))
    slope_r = -(pair.share_cr * _reward_weight(pair.reward_r, parameters))
    return slope_c * pair.pc + slope_r * pair.pr, slope_c, slope_r


@triton.jit
def selm(pair, parameters):
    return parameters.beta * pair.x, tl.zeros_like(pair.x) + parameters.beta


@triton.jit
def nll(pair, parameters):
    slope = tl.zeros_like(pair.px) - pair.share_x
    return slope * pair.px, slope


@triton.jit
def sorted_with_order(x, mask):
    """Sort fp32 lanes; return (values, lane each came from). NaN goes last, masked lanes after."""
    lanes = tl.arange(0, x.shape[0])
    # the bits of a float, as integers that order like it; + 0.0 makes -0.0 equal to 0.0
    bits = tl.where(x != x, float("nan"), x + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(x != x, 0x7FC00000, bits)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = tl.where(mask, keys, 0x7FFFFFFF).to(tl.int64)
    # equal values keep their order, and masked lanes lie behind the others of their key
    packed = tl.sort((keys << 32) | lanes.to(tl.int64))
    keys = (packed >> 32).to(tl.int32)
    values = tl.where(keys < 0, keys ^ 0x7FFFFFFF, keys).to(tl.float32, bitcast=True)
    return values, (packed & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _of_ranks(first, second, parameters):
    # loss of each rank and its slope
    eps = parameters.label_smoothing
    loss, slope = _smoothed(parameters.beta * (first - second), eps, eps)
    return loss, parameters.beta * slope


@triton.jit
def aot(pair, parameters):
    # only the policy's ranks get a gradient
    first, order = sorted_with_order(pair.ratio, pair.mask)
    second, _ = sorted_with_order(pair.ref_ratio, pair.mask)
    loss, slope = _of_ranks(first, second, parameters)
    return loss, slope, order, order


@triton.jit
def aot_unpaired(pair, parameters):
    first, order_c = sorted_with_order(pair.c, pair.mask)
    second, order_r = sorted_with_order(pair.r, pair.mask)
    loss, slope = _of_ranks(first, second, parameters)
    return loss, slope, order_c, order_r


@triton.jit
def _sum_of(x, mask):
    return tl.sum(tl.where(mask, x, 0.0), axis=0)


@triton.jit
def _deviations(u, pair):
    # distance from the mean and the unbiased variance, 0 for one pair
    centered = u - _sum_of(u, pair.mask) / pair.P
    ways = tl.maximum(pair.P - 1, 1).to(tl.float32)
    return centered, _sum_of(centered * centered, pair.mask) / ways, ways


@triton.jit
def _blended(m, q, blend_slope, parameters):
    # q sp(-m) + (1 - q) max(0, 1 - m), q = s(t), t' = blend_slope in u, minus it in the quantile
    logistic, lost = softplus_and_sigmoid(-m)
    slack, slack_slope = _hinge_of(m)
    pull = (logistic - slack) * q * (1.0 - q) * blend_slope
    slope = (1.0 - q) * slack_slope - q * lost + pull / _QUANTILE_TAU
    loss, slope_c, slope_r = _of_margin(q * logistic + (1.0 - q) * slack, slope, parameters.beta)
    return loss, slope_c, slope_r, -pull


@triton.jit
def aql(pair, parameters):
    m = _margin(pair, parameters)
    u = m / _QUANTILE_TAU
    _, mean = softplus_and_sigmoid(_sum_of(u, pair.mask) / pair.P)
    _, q = softplus_and_sigmoid(0.5 + 0.01 * (mean - 0.5) - u)
    loss, slope_c, slope_r, loss_slope = _blended(m, q, -1.0, parameters)
    statistic_slope = 0.01 * mean * (1.0 - mean) / (pair.P * _QUANTILE_TAU)
    return loss, slope_c, slope_r, loss_slope, tl.zeros_like(m) + statistic_slope


@triton.jit
def aqfl(pair, parameters):
    m = _margin(pair, parameters)
    u = m / _QUANTILE_TAU
    centered, variance, ways = _deviations(u, pair)
    deviation = tl.sqrt_rn(variance)
    _, below = softplus_and_sigmoid(-u)
    share_below = _sum_of(below, pair.mask) / pair.P
    _, mean = softplus_and_sigmoid(_sum_of(u, pair.mask) / pair.P)
    t = u - (0.95 * deviation * share_below + 0.05 * mean)
    _, q = softplus_and_sigmoid(0.1 * tl.abs(t))
    side = tl.where(t > 0.0, 0.1, tl.where(t < 0.0, -0.1, 0.0))
    loss, slope_c, slope_r, loss_slope = _blended(m, q, side, parameters)
    # where all margins are equal the deviation has no slope
    away = tl.where(deviation > 0.0, centered / tl.where(deviation > 0.0, ways * deviation, 1.0), 0)
    statistic_slope = 0.95 * (share_below * away - deviation * below * (1.0 - below) / pair.P)
    statistic_slope = (statistic_slope + 0.05 * mean * (1.0 - mean) / pair.P) / _QUANTILE_TAU
    return loss, slope_c, slope_r, loss_slope, statistic_slope


@triton.jit
def dbaql(pair, parameters):
    m = _margin(pair, parameters)
    centered, variance, ways = _deviations(m / _QUANTILE_TAU, pair)
    up, q = softplus_and_sigmoid(variance)
    _, rest = softplus_and_sigmoid(-variance)
    logistic, lost = softplus_and_sigmoid(-m / 0.9)
    # (1 - q) exp(-0.9 m), which would be 0 * inf far below 0
    exponential = tl.exp(-up - 0.9 * m)
    slope = -(q / 0.9) * lost - 0.9 * exponential
    loss, slope_c, slope_r = _of_margin(q * logistic + exponential, slope, parameters.beta)
    loss_slope = q * (rest * logistic - exponential)
    return loss, slope_c, slope_r, loss_slope, 2.0 * centered / (ways * _QUANTILE_TAU)
