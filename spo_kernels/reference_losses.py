"""Naive eager ``preference_loss`` and ``degree_loss``: oracle of the tests and readable spec.

Any float dtype, differentiable by autograd; never used by a backend.
"""

import torch
import torch.nn.functional as F


def _sigmoid(c, r, length_c, length_r, beta):
    return -F.logsigmoid(beta * (c - r))


def _hinge(c, r, length_c, length_r, beta):
    return torch.relu(1 - beta * (c - r))


def _ipo(c, r, length_c, length_r, beta):
    return (c / length_c - r / length_r - 1 / (2 * beta)) ** 2


_LOSS_OF = {"sigmoid": _sigmoid, "hinge": _hinge, "ipo": _ipo}


def preference_loss_reference(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    ref_chosen_logps: torch.Tensor | None = None,
    ref_rejected_logps: torch.Tensor | None = None,
    *,
    loss_type: str | list[str] = "sigmoid",
    loss_weights: list[float] | None = None,
    beta: float = 0.1,
    chosen_lengths: torch.Tensor | None = None,
    rejected_lengths: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Return every output of ``preference_loss`` by name, in the log-probs' dtype."""
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    weights = [1.0] * len(names) if loss_weights is None else loss_weights
    c = chosen_logps if ref_chosen_logps is None else chosen_logps - ref_chosen_logps
    r = rejected_logps if ref_rejected_logps is None else rejected_logps - ref_rejected_logps
    length_c = None if chosen_lengths is None else chosen_lengths.clamp(min=1)
    length_r = None if rejected_lengths is None else rejected_lengths.clamp(min=1)
    losses = torch.zeros_like(c)
    for name, weight in zip(names, weights, strict=True):
        losses = losses + weight * _LOSS_OF[name](c, r, length_c, length_r, beta)
    return {
        "losses": losses,
        "chosen_rewards": (beta * c).detach(),
        "rejected_rewards": (beta * r).detach(),
    }


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
