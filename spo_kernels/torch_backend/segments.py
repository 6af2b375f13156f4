"""Which segment of a packed batch each row lies in."""

import torch


def segments_of(offsets: torch.Tensor, rows: int) -> torch.Tensor:
    """Return ``[rows]`` int64: each row's segment, S where it lies in none.

    Segment s of S holds the rows ``offsets[s]`` up to ``offsets[s + 1]``; offsets do not fall.
    """
    S = offsets.numel() - 1
    places = torch.arange(rows, device=offsets.device)
    # the last of the segments that start at or before the row: empty ones are passed over
    segments = torch.searchsorted(offsets.contiguous(), places, right=True) - 1
    # rows behind the last offset are found in a segment S already
    return torch.where(segments < 0, S, segments)
