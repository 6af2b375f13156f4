"""Naive eager ``listwise_preference_loss``: oracle of the tests and readable spec.

Any float dtype, differentiable by autograd, one list at a time; never used by a backend.
"""

import torch
import torch.nn.functional as F

SINKHORN_ITERATIONS = 50


def _gains(psi):
    """2^psi - 1 over 2^max(psi): ratios of gains are what counts."""
    top = psi.max().clamp(min=0)
    return torch.exp2(psi - top) - torch.exp2(-top)


def _discounts(n, like):
    return 1 / torch.log2(torch.arange(2, n + 2, dtype=like.dtype))


def _idcg(psi):
    return (_gains(psi).sort(descending=True).values * _discounts(len(psi), psi)).sum()


def _neural_ndcg(y, psi, settings):
    n = len(y)
    ranks = torch.arange(1, n + 1, dtype=y.dtype)
    spread = (y[:, None] - y[None, :]).abs().sum(1)
    scores = (n + 1 - 2 * ranks)[:, None] * y[None, :] - spread[None, :]
    matrix = torch.softmax(scores / settings["ndcg_temperature"], dim=1)
    for _ in range(SINKHORN_ITERATIONS):
        matrix = matrix / matrix.sum(0, keepdim=True).clamp(min=1e-10)
        matrix = matrix / matrix.sum(1, keepdim=True).clamp(min=1e-10)
    return -(_discounts(n, y) * (matrix @ _gains(psi))).sum() / _idcg(psi)


def _approx_ndcg(y, psi, settings):
    above = torch.sigmoid(-settings["ndcg_alpha"] * (y[:, None] - y[None, :]))
    position = 1 + above.sum(1) - above.diagonal()
    return -(_gains(psi) / torch.log2(1 + position)).sum() / _idcg(psi)


def _pairs(psi):
    return [(i, j) for i in range(len(psi)) for j in range(len(psi)) if psi[i] > psi[j]]


def _lipo_lambda(y, psi, settings):
    order = y.argsort(descending=True, stable=True)
    discount = torch.empty_like(y)
    discount[order] = _discounts(len(y), y)
    total = 0
    for i, j in _pairs(psi):
        weight = (discount[i] - discount[j]).abs() * (torch.exp2(psi[i]) - torch.exp2(psi[j]))
        total = total + weight.detach() * -F.logsigmoid(y[i] - y[j])
    return total


def _list_mle(y, psi, settings):
    y = y[psi.argsort(descending=True, stable=True)]
    return sum(torch.logsumexp(y[k:], 0) - y[k] for k in range(len(y)))


def _all_pairs(y, psi, settings):
    pairs = _pairs(psi)
    return sum(-F.logsigmoid(y[i] - y[j]) for i, j in pairs) / len(pairs)


def _best_vs_rest(y, psi, settings):
    best = int(psi.argmax())
    rest = [j for j in range(len(psi)) if psi[j] < psi[best]]
    return sum(-F.logsigmoid(y[best] - y[j]) for j in rest) / len(rest)


LOSS_OF = {
    "neural_ndcg": _neural_ndcg,
    "approx_ndcg": _approx_ndcg,
    "lipo_lambda": _lipo_lambda,
    "list_mle": _list_mle,
    "all_pairs": _all_pairs,
    "best_vs_rest": _best_vs_rest,
}


def _counts(psi, loss_type):
    if len(psi) < 2:
        return False
    if loss_type in ("neural_ndcg", "approx_ndcg"):
        return bool(_idcg(psi) > 0)
    return loss_type == "list_mle" or bool(_pairs(psi))


def listwise_preference_loss_reference(
    logps: torch.Tensor,
    labels: torch.Tensor,
    ref_logps: torch.Tensor | None = None,
    *,
    loss_type: str = "neural_ndcg",
    beta: float = 0.1,
    ndcg_temperature: float = 1.0,
    ndcg_alpha: float = 25.0,
    mask: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Return every output of ``listwise_preference_loss`` by name, in the log-probs' dtype."""
    settings = {"ndcg_temperature": ndcg_temperature, "ndcg_alpha": ndcg_alpha}
    d = logps if ref_logps is None else logps - ref_logps
    mask = torch.ones_like(d, dtype=torch.bool) if mask is None else mask
    labels = labels.to(d.dtype)
    losses, counted = [], []
    for row, psi, is_there in zip(d, labels, mask, strict=True):
        y, psi = beta * row[is_there], psi[is_there]
        is_bad = bool((~y.isfinite() | ~psi.isfinite()).any())
        counted.append(is_bad or _counts(psi, loss_type))
        if is_bad:
            losses.append(y.sum() * torch.nan)
        elif counted[-1]:
            losses.append(LOSS_OF[loss_type](y, psi, settings))
        else:
            losses.append(y.sum() * 0)
    return {
        "losses": torch.stack(losses) if losses else d.sum(1),
        "rewards": (beta * d).detach().masked_fill(~mask, 0),
        "counted": torch.tensor(counted, dtype=torch.bool),
    }
