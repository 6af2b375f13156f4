"""Torch backend of ``bradley_terry_loss``: the kernel's launcher in plain torch.

fp32 arithmetic, fp64 where an input is fp64. Nothing is read back to the host.
"""

import torch

from spo_kernels.calls.checks import compute_dtype


def bradley_terry_loss_fwd(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    margins: torch.Tensor | None,
    *,
    center: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (losses [P], grads [2, P], is_correct [P]). Inputs are checked, 1-D, of one length."""
    dtype = compute_dtype(chosen, margins)
    c, r = chosen.to(dtype), rejected.to(dtype)
    x = c - r if margins is None else c - r - margins.to(dtype)
    losses = -torch.nn.functional.logsigmoid(x)
    sigmoid = torch.sigmoid(-x)
    grads = torch.stack((-sigmoid, sigmoid))
    # not a product with 0: an infinite reward would turn it into NaN
    if center != 0.0:
        total = c + r
        losses = losses + center * total * total
        grads = grads + 2.0 * center * total
    return losses, grads, c > r
