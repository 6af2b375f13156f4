"""A bounded sparse backward in plain torch: which tiles it keeps, what it computes, what it loses.

    G = g (onehot(label) - p)  [N, V];  grad_hidden = G W, grad_weight = G^T hidden

A tile is BLOCK_N rows x BLOCK_V vocab entries of G. The forward leaves q and p2, the sums of p and
p^2 of each row and vocab tile, so |G|^2 and every tile's share are known before the backward:

    |G|^2 = sum_n g_n^2 ((1 - p_y)^2 + sum_v p_v^2 - p_y^2)

A tile is kept if it holds a label or ``sum_n g_n^2 p2 > tolerance^2 |G|^2 / tiles``; then what is
dropped has a norm of at most ``tolerance |G|``. p2 is rounded up to a power of two, as one byte
would hold it. Everything here is fp32; N is a multiple of BLOCK_N, V of BLOCK_V.
"""

from typing import Any, NamedTuple

import torch

BLOCK_N = 128
BLOCK_V = 256
_CHUNK_V = 4096


class Forward(NamedTuple):
    """What the forward leaves for the backward."""

    logps: torch.Tensor  # [N]
    logsumexp: torch.Tensor  # [N]
    q: torch.Tensor  # [N, V / BLOCK_V] sum of p over a tile's entries
    p2: torch.Tensor  # [N, V / BLOCK_V] sum of p^2


class Selection(NamedTuple):
    """The tiles kept, and what is known of the rest before the backward."""

    keep: torch.Tensor  # [N / BLOCK_N, V / BLOCK_V] bool
    bound: torch.Tensor  # [] upper bound of |dropped part of G| / |G|


def forward(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> Forward:
    """Return log-probs and tile sums; ``hidden [N, H]``, ``weight [V, H]``, ``labels [N]``."""
    N, V = len(hidden), len(weight)
    maxima, sums, squares = (hidden.new_empty(N, V // BLOCK_V) for _ in range(3))
    for v0 in range(0, V, _CHUNK_V):
        logits = (hidden @ weight[v0 : v0 + _CHUNK_V].T).unflatten(1, (-1, BLOCK_V))
        tiles = slice(v0 // BLOCK_V, v0 // BLOCK_V + logits.shape[1])
        maxima[:, tiles] = logits.amax(-1)
        e = logits.sub_(maxima[:, tiles, None]).exp_()
        sums[:, tiles] = e.sum(-1)
        squares[:, tiles] = e.square_().sum(-1)
    logsumexp = torch.logsumexp(maxima + sums.log(), -1)
    target = (hidden * weight[labels]).sum(-1)
    scale = torch.exp(maxima - logsumexp[:, None])
    return Forward(target - logsumexp, logsumexp, sums * scale, squares * scale.square())


def select(
    saved: Forward, labels: torch.Tensor, upstream: torch.Tensor, tolerance: float
) -> Selection:
    """Return the tiles that are kept; at tolerance 0 that is every tile."""
    g2, p_label = upstream.square(), saved.logps.exp()
    rest = (saved.p2.sum(-1) - p_label.square()).clamp(min=0.0)
    norm2 = (g2 * ((1 - p_label).square() + rest)).sum()
    rounded = torch.exp2(saved.p2.log2().ceil()).clamp(min=2.0**-126)
    by_tile = (g2[:, None] * rounded).unflatten(0, (-1, BLOCK_N)).sum(1)
    keep = by_tile > tolerance**2 * norm2 / by_tile.numel()
    row_block = torch.arange(len(labels)) // BLOCK_N
    counted = upstream != 0
    keep[row_block[counted], labels[counted] // BLOCK_V] = True
    return Selection(keep, ((by_tile * ~keep).sum() / norm2.clamp(min=1e-30)).sqrt())


def backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    logsumexp: torch.Tensor,
    upstream: torch.Tensor,
    keep: torch.Tensor,
    *,
    need_weight: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return grad_hidden and grad_weight of the kept tiles: vocab tile outer, its rows gathered."""
    hidden_blocks = hidden.unflatten(0, (-1, BLOCK_N))
    per_row = [tensor.unflatten(0, (-1, BLOCK_N)) for tensor in (labels, logsumexp, upstream)]
    grad_hidden = torch.zeros_like(hidden_blocks)
    grad_weight = torch.zeros_like(weight) if need_weight else None
    for tile, kept in enumerate(keep.T):
        blocks = kept.nonzero()[:, 0]
        if not len(blocks):
            continue
        part = slice(tile * BLOCK_V, (tile + 1) * BLOCK_V)
        rows = hidden_blocks[blocks].flatten(0, 1)
        label, lse, g = (tensor[blocks].flatten() for tensor in per_row)
        grad = (rows @ weight[part].T).sub_(lse[:, None]).exp_().mul_(-g[:, None])
        column = label - part.start
        inside = (column >= 0) & (column < BLOCK_V)
        grad[inside, column[inside]] += g[inside]
        grad_hidden[blocks] += (grad @ weight[part]).view(-1, BLOCK_N, hidden.shape[1])
        if grad_weight is not None:
            torch.mm(grad.T, rows, out=grad_weight[part])
    return grad_hidden.flatten(0, 1), grad_weight


def mean_part(
    weight: torch.Tensor, upstream: torch.Tensor, q: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    """Return what dropped tiles add to grad_hidden if each vocab row is taken for its tile's mean.

    It costs 1 / BLOCK_V of a product.
    """
    dropped = (~keep).repeat_interleave(BLOCK_N, 0)
    means = weight.unflatten(0, (-1, BLOCK_V)).mean(1)
    return -upstream[:, None] * ((q * dropped) @ means)


def log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    order: torch.Tensor,
    tolerance: float,
    fractions: list[float],
) -> torch.Tensor:
    """Return log-probs ``[N]`` whose gradient is the sparse one, vocabulary taken in ``order``.

    Any N. The backward adds the fraction of tiles it kept to ``fractions``.
    """
    missing = -len(hidden) % BLOCK_N
    padded = torch.nn.functional.pad(hidden, (0, 0, 0, missing))
    ranks = torch.nn.functional.pad(torch.argsort(order)[labels], (0, missing))
    return _LogProbs.apply(padded, weight[order], ranks, tolerance, fractions)[: len(hidden)]


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, labels, tolerance: float, fractions: list[float]):
        saved = forward(hidden, weight, labels)
        ctx.save_for_backward(hidden, weight, labels, *saved)
        ctx.tolerance, ctx.fractions = tolerance, fractions
        return saved.logps

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor):
        hidden, weight, labels, *saved = ctx.saved_tensors
        saved = Forward(*saved)
        keep = select(saved, labels, upstream, ctx.tolerance).keep
        ctx.fractions.append(keep.float().mean().item())
        grads = backward(hidden, weight, labels, saved.logsumexp, upstream, keep)
        return *grads, None, None, None
