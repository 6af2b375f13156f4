"""The loss types of ``preference_loss`` in torch: each returns its value and its slopes.

A function of the scores or of the policy's log-probs returns (loss, slope of chosen, slope of
rejected), one of the third response (loss, slope); a batch type returns (loss, slopes, what couples
the pairs). A slope that is 0 everywhere is None. Formulas and symbols are in ``loss_table.py``.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

# log-probs and exponents are cut here, see the table
ORPO_LARGEST_LOGP = -1e-7
LARGEST_EXPONENT = 80.0
# AQL, AQFL and DBAQL measure margins in units of this
_QUANTILE_TAU = 0.05
_BISECTIONS = 60


class Pair(NamedTuple):
    """``[P]`` values of the pairs; a field no type of the mix needs is None."""

    c: torch.Tensor
    r: torch.Tensor
    pc: torch.Tensor
    pr: torch.Tensor
    # policy and reference, chosen minus rejected, which paired AOT sorts
    ratio: torch.Tensor | None
    ref_ratio: torch.Tensor | None
    len_c: torch.Tensor | None
    len_r: torch.Tensor | None
    x: torch.Tensor | None
    px: torch.Tensor | None
    len_x: torch.Tensor | None
    reward_c: torch.Tensor | None
    reward_r: torch.Tensor | None
    # P over the tokens of the batch: chosen, chosen and rejected, third responses
    share_c: torch.Tensor | None
    share_cr: torch.Tensor | None
    share_x: torch.Tensor | None


class Ranked(NamedTuple):
    """Ranks ``[2, P]`` of the scores, and the slope of the loss of that rank."""

    ranks: torch.Tensor
    slopes: torch.Tensor


class Coupled(NamedTuple):
    """dloss / dstatistic and dstatistic / dm, ``[P]`` each."""

    loss_slope: torch.Tensor
    statistic_slope: torch.Tensor


def softplus(x: torch.Tensor) -> torch.Tensor:
    """Return log(1 + exp(x)), to fp64's precision where torch's default drops the exponential."""
    return F.softplus(x, threshold=40.0)


def _of_margin(loss, slope, beta):
    """A function of m = beta (c - r) from its slope in m."""
    slope = beta * slope
    return loss, slope, -slope


def _margin(pair, parameters):
    return parameters.beta * (pair.c - pair.r)


def _smoothed(m, eps, flip):
    """Return (1 - eps) sp(-m) + flip sp(m) and its slope."""
    if eps == 0.0:
        # flip is 0 with it
        return softplus(-m), -torch.sigmoid(-m)
    loss = (1.0 - eps) * softplus(-m) + flip * softplus(m)
    return loss, flip * torch.sigmoid(m) - (1.0 - eps) * torch.sigmoid(-m)


def _hinge_of(m):
    slack = 1.0 - m
    # no gradient at the kink itself, and a NaN stays one
    is_met = slack <= 0.0
    slope = torch.full_like(m, -1.0).masked_fill(is_met, 0.0)
    return slack.masked_fill(is_met, 0.0), slope


def sigmoid(pair, parameters):
    down = parameters.beta * (pair.r - pair.c)
    slope = -parameters.beta * torch.sigmoid(down)
    return softplus(down), slope, -slope


def hinge(pair, parameters):
    return _of_margin(*_hinge_of(_margin(pair, parameters)), parameters.beta)


def ipo(pair, parameters):
    error = pair.c / pair.len_c - pair.r / pair.len_r - 0.5 / parameters.beta
    slope = 2.0 * error
    return error * error, slope / pair.len_c, -slope / pair.len_r


def exo_pair(pair, parameters):
    m = _margin(pair, parameters)
    eps = parameters.label_smoothing
    log_kept, log_flipped = math.log1p(-eps), math.log(eps)
    p, q = torch.sigmoid(m), torch.sigmoid(-m)
    loss = q * (-softplus(m) - log_flipped) - p * (softplus(-m) + log_kept)
    return _of_margin(loss, p * q * (m - log_kept + log_flipped), parameters.beta)


def nca_pair(pair, parameters):
    beta = parameters.beta
    u, v = beta * pair.c, beta * pair.r
    loss = softplus(-u) + 0.5 * softplus(u) + 0.5 * softplus(v)
    slope_u = 0.5 * torch.sigmoid(u) - torch.sigmoid(-u)
    return loss, beta * slope_u, 0.5 * beta * torch.sigmoid(v)


def robust(pair, parameters):
    eps = parameters.label_smoothing
    loss, slope = _smoothed(_margin(pair, parameters), eps, -eps)
    scale = 1.0 / (1.0 - 2.0 * eps)
    return _of_margin(loss * scale, slope * scale, parameters.beta)


def bco_pair(pair, parameters):
    beta = parameters.beta
    u, v = beta * pair.c, beta * pair.r
    return softplus(-u) + softplus(v), -beta * torch.sigmoid(-u), beta * torch.sigmoid(v)


def sppo_hard(pair, parameters):
    half = 0.5 / parameters.beta
    error_c, error_r = pair.c - half, pair.r + half
    return error_c * error_c + error_r * error_r, 2.0 * error_c, 2.0 * error_r


def apo_zero(pair, parameters):
    beta = parameters.beta
    u, v = beta * pair.c, beta * pair.r
    lost, kept = torch.sigmoid(-u), torch.sigmoid(v)
    slope_u, slope_v = -lost * torch.sigmoid(u), kept * torch.sigmoid(-v)
    return lost + kept, beta * slope_u, beta * slope_v


def apo_down(pair, parameters):
    beta, m = parameters.beta, _margin(pair, parameters)
    u = beta * pair.c
    kept, lost = torch.sigmoid(u), torch.sigmoid(-m)
    slope_u, slope_m = kept * torch.sigmoid(-u), lost * torch.sigmoid(m)
    # the slopes are (1 - tanh^2) / 4: near 0 their difference must not cancel
    tanh_u, tanh_m = torch.tanh(0.5 * u), torch.tanh(0.5 * m)
    near = 0.25 * (tanh_m - tanh_u) * (tanh_m + tanh_u)
    is_near = torch.maximum(u.abs(), m.abs()) < 1.0
    difference = torch.where(is_near, near, slope_u - slope_m)
    return kept + lost, beta * difference, beta * slope_m


def discopop(pair, parameters):
    m, tau = _margin(pair, parameters), parameters.discopop_tau
    down, u = -m, m / tau
    blend, rest = torch.sigmoid(u), torch.sigmoid(-u)
    logistic = softplus(down)
    # far below 0 the product would be 0 * inf, elsewhere it is the more exact
    far = torch.exp(down - softplus(-u))
    exponential = torch.where(down > LARGEST_EXPONENT, far, blend * torch.exp(down))
    slope = rest / tau * (exponential - blend * logistic) - rest * torch.sigmoid(down) - exponential
    return _of_margin(rest * logistic + exponential, slope, parameters.beta)


def sigmoid_norm(pair, parameters):
    m = parameters.beta * (pair.c / pair.len_c - pair.r / pair.len_r)
    slope = -parameters.beta * torch.sigmoid(-m)
    return softplus(-m), slope / pair.len_c, -slope / pair.len_r


def cpo(pair, parameters):
    eps = parameters.label_smoothing
    return _of_margin(*_smoothed(_margin(pair, parameters), eps, eps), parameters.beta)


def cell(pair, parameters):
    m = _margin(pair, parameters)
    exponential = 0.5 * torch.exp(-m)
    slope = -exponential - 0.5 * torch.sigmoid(-m)
    return _of_margin(exponential + 0.5 * softplus(-m), slope, parameters.beta)


def padll(pair, parameters):
    m = _margin(pair, parameters)
    decay = torch.full_like(m, 0.9).masked_fill(m < 0, 0.45)
    return _of_margin(decay * softplus(-m), -decay * torch.sigmoid(-m), parameters.beta)


def pfl(pair, parameters):
    m = _margin(pair, parameters)
    slack, slack_slope = _hinge_of(m)
    is_right = pair.pc > pair.pr
    loss = torch.where(is_right, 0.5 * softplus(-m), 2.0 * slack)
    slope = torch.where(is_right, -0.5 * torch.sigmoid(-m), 2.0 * slack_slope)
    return _of_margin(loss, slope, parameters.beta)


def ada_dpo(pair, parameters):
    m = _margin(pair, parameters)
    low, high = parameters.ada_tau_min, parameters.ada_tau_max
    tau = (m.abs() * parameters.ada_inverse_root).clamp(low, high)
    loss = tau * softplus(-m / tau) + (parameters.ada_rho - math.log(2.0)) * tau
    return _of_margin(loss, -torch.sigmoid(-m / tau), parameters.beta)


def ada_dpo_quadratic(pair, parameters):
    m, rho = _margin(pair, parameters), parameters.ada_rho
    # from here on the price outweighs what any temperature gains
    largest = max(parameters.ada_tau_min, min(parameters.ada_tau_max, math.log(2.0) / (2.0 * rho)))
    low = torch.full_like(m, parameters.ada_tau_min)
    high = torch.full_like(m, largest)
    for _ in range(_BISECTIONS):
        tau = 0.5 * (low + high)
        v = m.abs() / tau
        # dloss / dtau: the entropy of s(v), which grows with tau
        slope = softplus(v) - v * torch.sigmoid(v) - math.log(2.0) + 2.0 * rho * tau
        low, high = torch.where(slope < 0, tau, low), torch.where(slope < 0, high, tau)
    tau = 0.5 * (low + high)
    loss = tau * (softplus(-m / tau) + rho * tau - math.log(2.0))
    return _of_margin(loss, -torch.sigmoid(-m / tau), parameters.beta)


def dual_clip(pair, parameters):
    beta = parameters.beta
    u, v = beta * pair.c, beta * pair.r
    is_cut_c, is_cut_r = u > parameters.clip_chosen, v < -parameters.clip_rejected
    z = u.clamp(max=parameters.clip_chosen) - v.clamp(min=-parameters.clip_rejected)
    slope = -beta * torch.sigmoid(-z)
    return softplus(-z), slope.masked_fill(is_cut_c, 0.0), -slope.masked_fill(is_cut_r, 0.0)


def sft(pair, parameters):
    slope = -pair.share_c.expand_as(pair.pc)
    return slope * pair.pc, slope, None


def rpo(pair, parameters):
    return -pair.pc, torch.full_like(pair.pc, -1.0), None


def rpo_mean(pair, parameters):
    slope = -1.0 / pair.len_c
    return slope * pair.pc, slope, None


def _normalized(pair, parameters, reward_c, reward_r):
    """A SimPO loss of the two rewards, as if they were the log-probs per token."""
    beta, eps = parameters.beta, parameters.label_smoothing
    z = beta * (reward_c - reward_r) - parameters.simpo_gamma
    loss, slope = _smoothed(z, eps, eps)
    slope = beta * slope
    return loss, slope / pair.len_c, -slope / pair.len_r


def simpo(pair, parameters):
    return _normalized(pair, parameters, pair.pc / pair.len_c, pair.pr / pair.len_r)


def alphapo(pair, parameters):
    alpha = parameters.alphapo_alpha
    if alpha == 0.0:
        return simpo(pair, parameters)

    def bent(logp):
        exponent = -alpha * logp
        cut = exponent.clamp(max=LARGEST_EXPONENT)
        slope = torch.exp(cut).masked_fill(exponent > LARGEST_EXPONENT, 0.0)
        return -torch.expm1(cut) / alpha, slope

    reward_c, bend_c = bent(pair.pc / pair.len_c)
    reward_r, bend_r = bent(pair.pr / pair.len_r)
    loss, slope_c, slope_r = _normalized(pair, parameters, reward_c, reward_r)
    return loss, bend_c * slope_c, bend_r * slope_r


def orpo(pair, parameters):
    def log_odds(logp):
        # 1 - exp(t) without cancellation, and finite at t = 0
        rest = -torch.expm1(logp.clamp(max=ORPO_LARGEST_LOGP))
        slope = (1.0 / rest).masked_fill(logp > ORPO_LARGEST_LOGP, 0.0)
        return logp.clamp(max=ORPO_LARGEST_LOGP) - torch.log(rest), slope

    odds_c, slope_c = log_odds(pair.pc / pair.len_c)
    odds_r, slope_r = log_odds(pair.pr / pair.len_r)
    slope = -parameters.beta * torch.sigmoid(odds_r - odds_c)
    loss = parameters.beta * softplus(odds_r - odds_c)
    return loss, slope * slope_c / pair.len_c, -slope * slope_r / pair.len_r


def rwr(pair, parameters):
    def slope_of(reward):
        weight = torch.exp(reward / parameters.rwr_temperature)
        return -pair.share_cr * weight.clamp(max=parameters.rwr_max_weight)

    slope_c, slope_r = slope_of(pair.reward_c), slope_of(pair.reward_r)
    return slope_c * pair.pc + slope_r * pair.pr, slope_c, slope_r


def selm(pair, parameters):
    return parameters.beta * pair.x, torch.full_like(pair.x, parameters.beta)


def nll(pair, parameters):
    slope = -pair.share_x.expand_as(pair.px)
    return slope * pair.px, slope


def aot(pair, parameters):
    # only the policy is sorted with a gradient, and both sides of a pair move with its rank
    sorted_ratio, order = torch.sort(pair.ratio, stable=True)
    u = sorted_ratio - torch.sort(pair.ref_ratio).values
    return _ranked(u, (order, order), parameters)


def aot_unpaired(pair, parameters):
    sorted_c, order_c = torch.sort(pair.c, stable=True)
    sorted_r, order_r = torch.sort(pair.r, stable=True)
    return _ranked(sorted_c - sorted_r, (order_c, order_r), parameters)


def _ranked(u, orders, parameters):
    eps = parameters.label_smoothing
    loss, slope = _smoothed(parameters.beta * u, eps, eps)
    slope = parameters.beta * slope
    orders = torch.stack(orders)
    places = torch.arange(u.numel(), device=u.device).expand_as(orders)
    ranks = torch.empty_like(orders).scatter_(1, orders, places)
    return loss, None, None, Ranked(ranks, torch.stack((slope, -slope)).gather(1, ranks))


def aql(pair, parameters):
    m = _margin(pair, parameters)
    u = m / _QUANTILE_TAU
    mean = torch.sigmoid(u.mean())
    q = torch.sigmoid(0.5 + 0.01 * (mean - 0.5) - u)
    # dM / dm of each pair
    statistic_slope = 0.01 * mean * (1.0 - mean) / (_QUANTILE_TAU * m.numel())
    return _blended(m, q, -1.0, statistic_slope.expand_as(m), parameters)


def aqfl(pair, parameters):
    m = _margin(pair, parameters)
    P = m.numel()
    u = m / _QUANTILE_TAU
    centered = u - u.mean()
    deviation = torch.sqrt((centered * centered).sum() / max(P - 1, 1))
    below, mean = torch.sigmoid(-u), torch.sigmoid(u.mean())
    share_below = below.mean()
    t = u - (0.95 * deviation * share_below + 0.05 * mean)
    q = torch.sigmoid(0.1 * t.abs())
    # where all margins are equal the deviation has no slope
    away = torch.where(deviation > 0, centered / (max(P - 1, 1) * deviation), 0.0)
    statistic_slope = 0.95 * (share_below * away - deviation * below * (1.0 - below) / P)
    statistic_slope = (statistic_slope + 0.05 * mean * (1.0 - mean) / P) / _QUANTILE_TAU
    return _blended(m, q, 0.1 * torch.sign(t), statistic_slope, parameters)


def _blended(m, q, blend_slope, statistic_slope, parameters):
    """q sp(-m) + (1 - q) max(0, 1 - m), q = s(t), t' = blend_slope in u and its negative in M."""
    slack, slack_slope = _hinge_of(m)
    logistic = softplus(-m)
    pull = (logistic - slack) * q * (1.0 - q) * blend_slope
    slope = (1.0 - q) * slack_slope - q * torch.sigmoid(-m) + pull / _QUANTILE_TAU
    loss = q * logistic + (1.0 - q) * slack
    return *_of_margin(loss, slope, parameters.beta), Coupled(-pull, statistic_slope)


def dbaql(pair, parameters):
    m = _margin(pair, parameters)
    u = m / _QUANTILE_TAU
    centered = u - u.mean()
    ways = max(m.numel() - 1, 1)
    variance = (centered * centered).sum() / ways
    q = torch.sigmoid(variance)
    logistic = softplus(-m / 0.9)
    # (1 - q) exp(-0.9 m), which would be 0 * inf far below 0
    exponential = torch.exp(-softplus(variance) - 0.9 * m)
    slope = -q / 0.9 * torch.sigmoid(-m / 0.9) - 0.9 * exponential
    loss = q * logistic + exponential
    loss_slope = q * (torch.sigmoid(-variance) * logistic - exponential)
    statistic_slope = 2.0 * centered / (ways * _QUANTILE_TAU)
    return *_of_margin(loss, slope, parameters.beta), Coupled(loss_slope, statistic_slope)
