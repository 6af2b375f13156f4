"""Naive eager ``preference_loss``: oracle of the tests and readable spec.

Any float dtype, differentiable by autograd; never used by a backend. Formulas and symbols are in
``loss_table.py``.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F


def _smoothed(m, eps):
    return -(1 - eps) * F.logsigmoid(m) - eps * F.logsigmoid(-m)


def _clamped_exp(exponent):
    # the documented cut, which keeps the difference of two huge values a number
    return torch.exp(exponent.clamp(max=80.0))


def _sigmoid(p, o):
    return -F.logsigmoid(p.m)


def _hinge(p, o):
    return torch.relu(1 - p.m)


def _ipo(p, o):
    return (p.c / p.len_c - p.r / p.len_r - 1 / (2 * o.beta)) ** 2


def _exo_pair(p, o):
    eps = o.label_smoothing
    kept = torch.sigmoid(p.m) * (F.logsigmoid(p.m) - math.log(1 - eps))
    return kept + torch.sigmoid(-p.m) * (F.logsigmoid(-p.m) - math.log(eps))


def _nca_pair(p, o):
    u, v = o.beta * p.c, o.beta * p.r
    return -F.logsigmoid(u) - 0.5 * F.logsigmoid(-u) - 0.5 * F.logsigmoid(-v)


def _robust(p, o):
    eps = o.label_smoothing
    return (-(1 - eps) * F.logsigmoid(p.m) + eps * F.logsigmoid(-p.m)) / (1 - 2 * eps)


def _bco_pair(p, o):
    return -F.logsigmoid(o.beta * p.c) - F.logsigmoid(-o.beta * p.r)


def _sppo_hard(p, o):
    return (p.c - 0.5 / o.beta) ** 2 + (p.r + 0.5 / o.beta) ** 2


def _aot(p, o):
    policy = torch.sort(p.policy_c - p.policy_r, stable=True).values
    u = policy - torch.sort(p.ref_c - p.ref_r).values
    return _smoothed(o.beta * u, o.label_smoothing)


def _aot_unpaired(p, o):
    u = torch.sort(p.c, stable=True).values - torch.sort(p.r, stable=True).values
    return _smoothed(o.beta * u, o.label_smoothing)


def _apo_zero(p, o):
    return torch.sigmoid(-o.beta * p.c) + torch.sigmoid(o.beta * p.r)


def _apo_down(p, o):
    return torch.sigmoid(o.beta * p.c) + torch.sigmoid(-p.m)


def _discopop(p, o):
    q = torch.sigmoid(p.m / o.discopop_tau)
    # q exp(-m) with the exponents added first
    return -(1 - q) * F.logsigmoid(p.m) + torch.exp(F.logsigmoid(p.m / o.discopop_tau) - p.m)


def _sigmoid_norm(p, o):
    return -F.logsigmoid(o.beta * (p.c / p.len_c - p.r / p.len_r))


def _cpo(p, o):
    return _smoothed(p.m, o.label_smoothing)


def _cell(p, o):
    return 0.5 * torch.exp(-p.m) - 0.5 * F.logsigmoid(p.m)


def _padll(p, o):
    loss = -0.9 * F.logsigmoid(p.m)
    return torch.where(p.m < 0, loss / 2, loss)


def _pfl(p, o):
    return torch.where(p.pc > p.pr, -F.logsigmoid(p.m) / 2, 2 * torch.relu(1 - p.m))


def _blend(p, q):
    return -q * F.logsigmoid(p.m) + (1 - q) * torch.relu(1 - p.m)


def _aql(p, o):
    u = p.m / 0.05
    moving = 0.5 + 0.01 * (torch.sigmoid(u.mean()) - 0.5)
    return _blend(p, torch.sigmoid(moving - u))


def _variance(u):
    """The unbiased variance, 0 for one pair."""
    return ((u - u.mean()) ** 2).sum() / max(u.numel() - 1, 1)


def _aqfl(p, o):
    u = p.m / 0.05
    variance = _variance(u)
    # the root has no slope at 0
    deviation = torch.sqrt(variance) if variance > 0 else torch.zeros_like(variance)
    quantile = 0.95 * deviation * torch.sigmoid(-u).mean() + 0.05 * torch.sigmoid(u.mean())
    return _blend(p, torch.sigmoid(0.1 * (u - quantile).abs()))


def _dbaql(p, o):
    variance = _variance(p.m / 0.05)
    # (1 - q) exp(-0.9 m) with the exponents added first
    exponential = torch.exp(F.logsigmoid(-variance) - 0.9 * p.m)
    return -torch.sigmoid(variance) * F.logsigmoid(p.m / 0.9) + exponential


def _ada_dpo(p, o):
    # the entropy of s(u) at the best temperature is log 2 - rho
    low, high = 1e-12, 700.0
    for _ in range(200):
        u = (low + high) / 2
        entropy = math.log1p(math.exp(-u)) + u / (1 + math.exp(u))
        low, high = (u, high) if entropy > math.log(2) - o.ada_rho else (low, u)
    tau = p.m.detach().abs() / high if o.ada_rho < math.log(2) else torch.zeros_like(p.m)
    tau = tau.clamp(o.ada_tau_min, o.ada_tau_max)
    return -tau * F.logsigmoid(p.m / tau) + (o.ada_rho - math.log(2)) * tau


def _ada_dpo_quadratic(p, o):
    m = p.m.detach().abs()
    low = torch.full_like(m, o.ada_tau_min)
    # beyond log 2 / (2 rho) the loss only grows
    high = torch.full_like(m, max(o.ada_tau_min, min(o.ada_tau_max, math.log(2) / 2 / o.ada_rho)))
    for _ in range(200):
        tau = (low + high) / 2
        share = torch.sigmoid(m / tau)
        entropy = -share * F.logsigmoid(m / tau) - (1 - share) * F.logsigmoid(-m / tau)
        grows = entropy - math.log(2) + 2 * o.ada_rho * tau > 0
        low, high = torch.where(grows, low, tau), torch.where(grows, tau, high)
    tau = (low + high) / 2
    return -tau * F.logsigmoid(p.m / tau) + o.ada_rho * tau**2 - tau * math.log(2)


def _dual_clip(p, o):
    u = torch.where(o.beta * p.c > o.clip_chosen, o.clip_chosen, o.beta * p.c)
    v = torch.where(o.beta * p.r < -o.clip_rejected, -o.clip_rejected, o.beta * p.r)
    return -F.logsigmoid(u - v)


def _sft(p, o):
    return -p.pc * p.pc.numel() / p.count_c.sum().clamp(min=1)


def _rpo(p, o):
    return -p.pc


def _rpo_mean(p, o):
    return -p.pc / p.len_c


def _simpo(p, o):
    z = o.beta * (p.pc / p.len_c - p.pr / p.len_r) - o.simpo_gamma
    return _smoothed(z, o.label_smoothing)


def _alphapo(p, o):
    if o.alphapo_alpha == 0:
        return _simpo(p, o)
    a = o.alphapo_alpha
    reward_c = (1 - _clamped_exp(-a * p.pc / p.len_c)) / a
    reward_r = (1 - _clamped_exp(-a * p.pr / p.len_r)) / a
    return _smoothed(o.beta * (reward_c - reward_r) - o.simpo_gamma, o.label_smoothing)


def _orpo(p, o):
    def log_odds(logp):
        # the documented cut, where a response is certain
        logp = torch.where(logp > -1e-7, -1e-7, logp)
        return logp - torch.log(-torch.expm1(logp))

    return -o.beta * F.logsigmoid(log_odds(p.pc / p.len_c) - log_odds(p.pr / p.len_r))


def _rwr(p, o):
    def weight(reward):
        return torch.exp(reward / o.rwr_temperature).clamp(max=o.rwr_max_weight)

    total = (p.count_c.sum() + p.count_r.sum()).clamp(min=1)
    weighted = weight(p.reward_c) * p.pc + weight(p.reward_r) * p.pr
    return -weighted * p.pc.numel() / total


def _selm(p, o):
    return o.beta * p.x


def _nll(p, o):
    return -p.px * p.px.numel() / p.count_x.sum().clamp(min=1)


LOSS_OF = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
    "cpo": _cpo,
    "cell": _cell,
    "padll": _padll,
    "pfl": _pfl,
    "aql": _aql,
    "aqfl": _aqfl,
    "dbaql": _dbaql,
    "ada_dpo": _ada_dpo,
    "ada_dpo_quadratic": _ada_dpo_quadratic,
    "dual_clip": _dual_clip,
    "sft": _sft,
    "rpo": _rpo,
    "rpo_mean": _rpo_mean,
    "simpo": _simpo,
    "alphapo": _alphapo,
    "orpo": _orpo,
    "rwr": _rwr,
    "selm": _selm,
    "nll": _nll,
}


def _divergence(c, name, coef):
    """f' of the ratio of policy and reference, c its log."""
    if name == "forward_kl":
        return 1 - _clamped_exp(-c)
    if name == "js_divergence":
        return math.log(2) + F.logsigmoid(c)
    if name == "alpha_divergence" and abs(coef - 1) >= 1e-6:
        return (_clamped_exp((coef - 1) * c) - 1) / (coef - 1)
    return c


def _segments(values, offsets):
    """One row of tokens for each response."""
    if offsets is None:
        return list(values)
    bounds = offsets.tolist()
    flat = values.reshape(-1)
    return [flat[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]


def _widened(values, like):
    """The oracle's inputs beside the log-probs: nothing of it is computed in fp32."""
    return None if values is None else values.to(torch.promote_types(values.dtype, like.dtype))


def _side(logps, ref, mask, offsets, lengths, log_sum_sq):
    """Token rows, masks and lengths of one response of every pair; sums are rows of one token."""
    if logps.dim() == 1:
        logps, offsets, mask = logps[:, None], None, None
    rows = _segments(logps, offsets)
    masks = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    if mask is not None:
        masks = [row != 0 for row in _segments(mask, offsets)]
        lengths = torch.tensor([int(row.sum()) for row in masks], device=logps.device)

    def tokens(values):
        values = _widened(values, logps)
        # sums stay sums
        return values if values is None or values.dim() == 1 else _segments(values, offsets)

    return SimpleNamespace(
        rows=rows, masks=masks, ref=tokens(ref), square=tokens(log_sum_sq), lengths=lengths
    )


def _total(rows, masks, like, weights=None):
    """``[P]`` sums over the tokens that count; sums are taken as they are, None is 0."""
    if rows is None or isinstance(rows, torch.Tensor):
        return torch.zeros_like(like) if rows is None else rows
    weights = [1.0] * len(rows) if weights is None else weights
    totals = [
        (torch.where(mask, row, 0.0) * weight).sum()
        for row, mask, weight in zip(rows, masks, weights, strict=True)
    ]
    # no pairs, but connected to what they would come from
    return torch.stack(totals) if totals else like.reshape(-1)[:0]


def preference_loss_reference(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    ref_chosen_logps: torch.Tensor | None = None,
    ref_rejected_logps: torch.Tensor | None = None,
    *,
    loss_type: str | list[str] = "sigmoid",
    loss_weights: list[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    ld_alpha: float | None = None,
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
    alphapo_alpha: float = 0.0,
    ada_rho: float = 0.1,
    ada_tau_min: float = 0.1,
    ada_tau_max: float = 4.0,
    clip_chosen: float = 5.0,
    clip_rejected: float = 5.0,
    rwr_temperature: float = 1.0,
    rwr_max_weight: float = math.inf,
    min_reward_margin: float = 0.0,
    chosen_mask: torch.Tensor | None = None,
    rejected_mask: torch.Tensor | None = None,
    chosen_offsets: torch.Tensor | None = None,
    rejected_offsets: torch.Tensor | None = None,
    chosen_lengths: torch.Tensor | None = None,
    rejected_lengths: torch.Tensor | None = None,
    chosen_log_sum_sq_probs: torch.Tensor | None = None,
    rejected_log_sum_sq_probs: torch.Tensor | None = None,
    response_logps: torch.Tensor | None = None,
    ref_response_logps: torch.Tensor | None = None,
    response_mask: torch.Tensor | None = None,
    response_offsets: torch.Tensor | None = None,
    response_lengths: torch.Tensor | None = None,
    pair_weights: torch.Tensor | None = None,
    reward_chosen: torch.Tensor | None = None,
    reward_rejected: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Return every output of ``preference_loss`` by name, in the log-probs' dtype."""
    options = SimpleNamespace(
        beta=beta,
        label_smoothing=label_smoothing,
        discopop_tau=discopop_tau,
        simpo_gamma=simpo_gamma,
        alphapo_alpha=alphapo_alpha,
        ada_rho=ada_rho,
        ada_tau_min=ada_tau_min,
        ada_tau_max=ada_tau_max,
        clip_chosen=clip_chosen,
        clip_rejected=clip_rejected,
        rwr_temperature=rwr_temperature,
        rwr_max_weight=rwr_max_weight,
    )
    reward_chosen = _widened(reward_chosen, chosen_logps)
    reward_rejected = _widened(reward_rejected, chosen_logps)
    pair = SimpleNamespace(reward_c=reward_chosen, reward_r=reward_rejected)
    sides = {
        "c": _side(
            chosen_logps,
            ref_chosen_logps,
            chosen_mask,
            chosen_offsets,
            chosen_lengths,
            chosen_log_sum_sq_probs,
        ),
        "r": _side(
            rejected_logps,
            ref_rejected_logps,
            rejected_mask,
            rejected_offsets,
            rejected_lengths,
            rejected_log_sum_sq_probs,
        ),
    }
    if response_logps is not None:
        sides["x"] = _side(
            response_logps,
            ref_response_logps,
            response_mask,
            response_offsets,
            response_lengths,
            None,
        )
    shared = None
    if ld_alpha is not None:
        # of two Python numbers torch.where would make fp32
        wide = torch.promote_types(chosen_logps.dtype, torch.float32)
        tail = torch.tensor(ld_alpha, dtype=wide, device=chosen_logps.device)
        counts = [[int(mask.sum()) for mask in sides[key].masks] for key in "cr"]
        shared = [min(pair_counts) for pair_counts in zip(*counts, strict=True)]
    for key, side in sides.items():
        weights = None
        if shared is not None and key != "x":
            weights = [
                torch.where(mask.cumsum(0) > limit, tail, 1.0)
                for mask, limit in zip(side.masks, shared, strict=True)
            ]
        plain = _total(side.rows, side.masks, chosen_logps)
        policy = _total(side.rows, side.masks, chosen_logps, weights)
        ref = _total(side.ref, side.masks, plain.detach(), weights)
        setattr(pair, f"p{key}", plain)
        setattr(pair, f"policy_{key}", policy)
        setattr(pair, f"ref_{key}", ref)
        setattr(pair, key, policy - ref)
        if side.lengths is not None:
            setattr(pair, f"count_{key}", side.lengths)
            setattr(pair, f"len_{key}", side.lengths.clamp(min=1))

    out = {
        "chosen_rewards": (beta * pair.c).detach(),
        "rejected_rewards": (beta * pair.r).detach(),
        "chosen_logps": pair.pc.detach(),
        "rejected_logps": pair.pr.detach(),
    }
    pair.c = _divergence(pair.c, f_divergence_type, f_alpha_divergence_coef)
    pair.r = _divergence(pair.r, f_divergence_type, f_alpha_divergence_coef)
    pair.m = beta * (pair.c - pair.r)
    weight = torch.ones_like(pair.pc).detach() if pair_weights is None else pair_weights
    if chosen_log_sum_sq_probs is not None:
        mean = 0.0
        for key in "cr":
            side = sides[key]
            square = _total(side.square, side.masks, chosen_logps)
            mean = mean + (getattr(pair, f"p{key}") - square) / getattr(pair, f"len_{key}")
        weight = weight * torch.exp(mean).detach()
    if min_reward_margin > 0:
        is_near = (reward_chosen - reward_rejected).abs() < min_reward_margin
        weight = torch.where(is_near, 0.0, weight)
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    mix = [1.0] * len(names) if loss_weights is None else loss_weights
    losses = torch.zeros_like(pair.pc)
    for name, scale in zip(names, mix, strict=True):
        losses = losses + scale * LOSS_OF[name](pair, options)
    out["losses"] = torch.where(weight == 0, 0.0, weight * losses)
    return out
