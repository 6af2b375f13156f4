"""Turns shortened responses that went through the model into rows that ``degree_loss`` reads.

``degree_loss`` takes means of running sums: view k = mean of the rows whose level is 0 or above k.
Let a response have views 0 = v_0 < ... < v_m with pooled states p_0 .. p_m. The rows

    r_j = (m - j + 1) p_j - (m - j) p_{j+1}  with level v_{j+1},   r_m = p_m  with level 0

make the mean that it forms for view v_j equal to p_j, so both kinds of view share one loss.
"""

import torch


def pool_views(
    hidden: torch.Tensor,  # [M, T, H]
    completion_mask: torch.Tensor,  # [M, T]
    pooling: str,
) -> torch.Tensor:
    """Return ``[M, H]`` fp32: the mean (or the last) of each sequence's response states."""
    mask = completion_mask != 0
    if pooling == "last":
        steps = torch.arange(mask.size(1), device=mask.device)
        last = (mask * steps).argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=last.device), last].float()
    weights = mask / mask.sum(dim=1, keepdim=True).clamp(min=1)
    # autocast would round the means, whose differences are what the rows below are made of
    with torch.autocast(hidden.device.type, enabled=False):
        return torch.bmm(weights.to(torch.float32)[:, None], hidden.float())[:, 0]


def telescope(
    pooled: torch.Tensor,  # [S + E, H]
    view_order: torch.Tensor,  # [M = S + E]
    removal_levels: torch.Tensor,  # [M]
    segment_offsets: torch.Tensor,  # [S + 1]
) -> torch.Tensor:
    """Return the rows ``[M, H]`` of the module's formula, in the order of ``view_order``."""
    place = torch.arange(len(view_order), device=pooled.device)
    segment_end = segment_offsets[torch.bucketize(place, segment_offsets, right=True)]
    kept_rows = (segment_end - place)[:, None]
    sums = pooled[view_order] * kept_rows
    # levels that the next view lacks; the last view of a response stands alone
    following = torch.cat((sums[1:], sums[-1:]))
    return sums - following.where((removal_levels != 0)[:, None], 0.0)
