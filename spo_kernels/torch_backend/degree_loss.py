"""Torch backend of ``degree_loss``: the kernels' launchers in plain torch.

fp32 arithmetic, fp64 where an input is fp64. Nothing is read back to the host and no loop runs over
segments or views.
"""

import torch
import torch.nn.functional as F

from spo_kernels.calls.checks import compute_dtype
from spo_kernels.torch_backend.segments import segments_of

# rows of half-precision hidden states widened at a time, few enough to stay in a cache
_ROW_CHUNK = 512
# hidden elements of a partial sum of the logits, whose order is the BLAS's
_LOGIT_BLOCK = 32


def degree_loss_fwd(
    hidden: torch.Tensor,
    levels: torch.Tensor,
    segment_offsets: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor | None,
    *,
    center_views: bool,
) -> tuple[torch.Tensor, ...]:
    """Return (losses, correct_views, counted_views, view_mask, level_grad, head_grad).

    Inputs are checked and on one device; strides are free.
    """
    dtype = compute_dtype(hidden, head_weight)
    S, (K, H) = segment_offsets.numel() - 1, head_weight.shape
    slots, is_bad = _slots(levels, segment_offsets, K)
    # the last slot takes the rows that no response holds
    sums = torch.zeros(S * K + 1, H, dtype=dtype, device=hidden.device)
    rows = _ROW_CHUNK if hidden.dtype != dtype else max(hidden.shape[0], 1)
    for start in range(0, hidden.shape[0], rows):
        chunk = slice(start, start + rows)
        sums.index_add_(0, slots[chunk], hidden[chunk].to(dtype))
    ones = torch.ones_like(slots, dtype=dtype)
    counts = torch.zeros(S * K + 1, dtype=dtype, device=hidden.device).index_add_(0, slots, ones)
    sums, counts = sums[:-1].view(S, K, H), counts[:-1].view(S, K)

    matrix, view_mask = _views(counts, center_views)
    pooled = matrix @ sums
    logits = _logits(pooled, head_weight.to(dtype))
    if head_bias is not None:
        logits = logits + head_bias.to(dtype)
    log_probs = torch.log_softmax(logits, dim=-1)
    counted_views = view_mask.sum(-1)
    scale = 1.0 / counted_views.clamp(min=1).to(dtype)
    is_label = torch.eye(K, dtype=torch.bool, device=hidden.device)
    view_losses = -log_probs.diagonal(dim1=-2, dim2=-1)
    losses = view_losses.masked_fill(~view_mask, 0.0).sum(-1) * scale
    losses = losses.masked_fill(is_bad, torch.nan)
    # the label's is minus the others' sum: p - 1 would round at the size of 1 where p nears it
    others = log_probs.exp().masked_fill(is_label, 0.0)
    grad_logits = (others - torch.diag_embed(others.sum(-1))) * scale[:, None, None]
    grad_logits = grad_logits.masked_fill(~view_mask[:, :, None], 0.0)
    level_grad = matrix.mT @ (grad_logits @ head_weight.to(dtype))
    head_grad = torch.cat(((grad_logits.mT @ pooled).flatten(1), grad_logits.sum(1)), dim=1)

    # the first maximum wins a tie
    is_top = logits == logits.amax(-1, keepdim=True)
    is_first_top = is_top & (is_top.cumsum(-1) == 1)
    is_correct = is_first_top.diagonal(dim1=-2, dim2=-1) & view_mask
    correct_views = is_correct.sum(-1).to(torch.int32)
    counted_views = counted_views.to(torch.int32)
    return losses, correct_views, counted_views, view_mask, level_grad, head_grad


def degree_loss_bwd_hidden(
    levels: torch.Tensor,
    segment_offsets: torch.Tensor,
    level_grad: torch.Tensor,
    grad_losses: torch.Tensor,
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return grad_hidden [N, H]: each row takes its level's gradient, scaled by its segment's."""
    S, K, H = level_grad.shape
    slots, _ = _slots(levels, segment_offsets, K)
    rows = torch.zeros(S * K + 1, H, dtype=dtype, device=levels.device)
    rows[:-1] = (level_grad * grad_losses[:, None, None]).view(S * K, H)
    return rows.index_select(0, slots)


def degree_loss_bwd_head(
    head_grad: torch.Tensor, grad_losses: torch.Tensor, *, dtype: torch.dtype
) -> torch.Tensor:
    """Return the head's gradient [K * H + K], weight then bias, summed over segments in order."""
    return (head_grad * grad_losses[:, None]).sum(0).to(dtype)


def _slots(
    levels: torch.Tensor, segment_offsets: torch.Tensor, K: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's (segment, level) as one index, and which segments hold a bad level."""
    S = segment_offsets.numel() - 1
    segments = segments_of(segment_offsets, levels.numel())
    levels = levels.long()
    inside = segments < S
    is_used = inside & (levels >= 0) & (levels < K)
    slots = torch.where(is_used, segments * K + levels, S * K)
    bad_rows = inside & ((levels < -1) | (levels >= K))
    bad_count = torch.zeros(S + 1, dtype=torch.int64, device=levels.device)
    bad_count.index_add_(0, torch.where(bad_rows, segments, S), bad_rows.long())
    return slots, bad_count[:S] > 0


def _views(counts: torch.Tensor, center_views: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the view matrix [S, K, K] over levels and which views count [S, K]."""
    K = counts.shape[1]
    degrees = torch.arange(K, device=counts.device)
    keeps = (degrees == 0) | (degrees > degrees[:, None])
    kept_rows = counts @ keeps.to(counts.dtype).T
    removes_more = (counts > 0) | (degrees == 0)
    has_key_content = (counts[:, 1:] > 0).any(1, keepdim=True)
    view_mask = removes_more & (kept_rows > 0) & has_key_content
    matrix = keeps / kept_rows.clamp(min=1.0)[:, :, None]
    matrix = matrix.masked_fill(~view_mask[:, :, None], 0.0)
    if center_views:
        counted_views = view_mask.sum(1).clamp(min=1)[:, None, None]
        matrix = matrix - matrix.sum(1, keepdim=True) / counted_views
        matrix = matrix.masked_fill(~view_mask[:, :, None], 0.0)
    return matrix, view_mask


def _logits(pooled: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return ``pooled @ weight.T`` [S, K, K], the sums over H taken in blocks, then over blocks.

    MKL adds all H products one after the other from six rows on, at three times the rounding error
    of the order it takes for fewer.
    """
    blocks = (
        F.pad(t, (0, -t.shape[-1] % _LOGIT_BLOCK)).unflatten(-1, (-1, _LOGIT_BLOCK))
        for t in (pooled, weight)
    )
    return torch.einsum("skbh,lbh->bskl", *blocks).sum(0)
