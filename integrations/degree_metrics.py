"""Sums of what the ``spo/*`` metrics are made of, over a logging window and all ranks."""

import torch


class DegreeMetrics:
    """Adds up counts on the device; they are read back only when a window is logged.

    ``spo/alignment_loss + gamma * spo/degree_loss`` is the training loss of the window.
    """

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def add(self, pairs: torch.Tensor) -> None:
        """Add ``[P, F]`` rows made by ``pair_counts``."""
        total = pairs.sum(dim=0)
        self._sums = total if self._sums is None else self._sums + total

    def pop(self) -> dict[str, float]:
        """Return the metrics of the window and start the next one; {} for an empty window."""
        if self._sums is None:
            return {}
        pairs, alignment, *degree = self._sums.tolist()
        self._sums = None
        metrics = {"spo/alignment_loss": alignment / pairs}
        if degree:
            losses, correct, empty, *views = degree
            counted = sum(views)
            metrics["spo/degree_loss"] = losses / pairs
            metrics["spo/degree_accuracy"] = correct / counted if counted else 0.0
            metrics["spo/degree_chance"] = max(views) / counted if counted else 0.0
            metrics["spo/no_key_content"] = empty / (2 * pairs)
        return metrics


def pair_counts(
    alignment_loss: torch.Tensor,
    num_pairs: int,
    losses: torch.Tensor | None,
    correct_views: torch.Tensor | None,
    counted_views: torch.Tensor | None,
    view_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Return ``[P, F]`` fp32: per pair 1, the alignment loss and any counts of the degree loss."""
    alignment = alignment_loss.detach().float().expand(num_pairs)
    columns = [torch.ones_like(alignment), alignment]
    if losses is not None:
        per_response = torch.stack((losses.detach(), correct_views, counted_views == 0), dim=1)
        per_response = torch.cat((per_response, view_mask), dim=1)
        columns += per_response.view(2, num_pairs, -1).sum(dim=0).unbind(dim=1)
    return torch.stack([column.to(alignment) for column in columns], dim=1)
