"""Naive eager ``degree_loss``: oracle of the tests and readable spec.

Any float dtype, differentiable by autograd; never used by a backend.
"""

import torch
import torch.nn.functional as F


def degree_loss_reference(
    hidden: torch.Tensor,
    removal_levels: torch.Tensor,
    segment_offsets: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor | None = None,
    *,
    center_views: bool = False,
) -> dict[str, torch.Tensor]:
    """Return every output of ``degree_loss`` by name, in hidden's dtype."""
    K = head_weight.shape[0]
    offsets = segment_offsets.tolist()
    losses, correct_views, counted_views, view_mask = [], [], [], []
    for start, end in zip(offsets, offsets[1:], strict=False):
        levels = removal_levels[start:end]
        pooled, labels = [], []
        for k in range(K):
            is_kept = (levels == 0) | (levels > k)
            removes_more = k == 0 or bool((levels == k).any())
            if (levels > 0).any() and removes_more and is_kept.any():
                pooled.append(hidden[start:end][is_kept].mean(0))
                labels.append(k)
        view_mask.append([k in labels for k in range(K)])
        counted_views.append(len(labels))
        if not labels:
            losses.append(hidden.new_zeros(()))
            correct_views.append(0)
            continue
        pooled = torch.stack(pooled)
        if center_views:
            pooled = pooled - pooled.mean(0)
        logits = F.linear(pooled, head_weight, head_bias)
        labels = torch.tensor(labels, device=hidden.device)
        losses.append(F.cross_entropy(logits, labels))
        correct_views.append(int((logits.argmax(-1) == labels).sum()))
    device = hidden.device
    return {
        "losses": torch.stack(losses) if losses else hidden.new_zeros(0),
        "correct_views": torch.tensor(correct_views, dtype=torch.int32, device=device),
        "counted_views": torch.tensor(counted_views, dtype=torch.int32, device=device),
        "view_mask": torch.tensor(view_mask, dtype=torch.bool, device=device).view(-1, K),
    }
