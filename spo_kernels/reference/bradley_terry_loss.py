"""Naive eager ``bradley_terry_loss``: oracle of the tests and readable spec.

Any float dtype, differentiable by autograd; never used by a backend.
"""

import torch
import torch.nn.functional as F


def bradley_terry_loss_reference(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    margins: torch.Tensor | None = None,
    *,
    center_rewards_coefficient: float | None = None,
) -> dict[str, torch.Tensor]:
    """Return every output of ``bradley_terry_loss`` by name, in the rewards' dtype."""
    c, r = chosen_rewards.flatten(), rejected_rewards.flatten()
    losses = -F.logsigmoid(c - r if margins is None else c - r - margins)
    if center_rewards_coefficient is not None:
        losses = losses + center_rewards_coefficient * (c + r) ** 2
    return {"losses": losses, "is_correct": c > r}
