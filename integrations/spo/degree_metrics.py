"""Sums of what the ``spo/*`` metrics are made of, over a logging window and all ranks."""

import torch


class DegreeMetrics:
    """Adds up counts on the device; they are read back only when a window is logged.

    ``spo/alignment_loss + gamma * spo/degree_loss`` is the training loss of the window.
    """

    def __init__(self, num_sides: int) -> None:
        self._num_sides = num_sides
        self._sums: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        """Add ``[R, F]`` rows made by ``row_counts``."""
        total = rows.sum(dim=0)
        self._sums = total if self._sums is None else self._sums + total

    def pop(self) -> dict[str, float]:
        """Return the metrics of the window and start the next one; {} for an empty window."""
        if self._sums is None:
            return {}
        rows, alignment, *degree = self._sums.tolist()
        self._sums = None
        metrics = {"spo/alignment_loss": alignment / rows}
        if degree:
            losses, correct, empty, *views = degree
            counted = sum(views)
            metrics["spo/degree_loss"] = losses / rows
            metrics["spo/degree_accuracy"] = correct / counted if counted else 0.0
            metrics["spo/degree_chance"] = max(views) / counted if counted else 0.0
            metrics["spo/no_key_content"] = empty / (self._num_sides * rows)
        return metrics


def row_counts(
    alignment_loss: torch.Tensor,
    num_rows: int,
    losses: torch.Tensor | None,
    correct_views: torch.Tensor | None,
    counted_views: torch.Tensor | None,
    view_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Return ``[R, F]`` fp32: per row 1, the alignment loss and any counts of the degree loss.

    A row of the data set has one response a side; the losses of the first side come first.
    """
    alignment = alignment_loss.detach().float().expand(num_rows)
    columns = [torch.ones_like(alignment), alignment]
    if losses is not None:
        per_response = torch.stack((losses.detach(), correct_views, counted_views == 0), dim=1)
        per_response = torch.cat((per_response, view_mask), dim=1)
        columns += per_response.view(-1, num_rows, per_response.size(1)).sum(dim=0).unbind(dim=1)
    return torch.stack([column.to(alignment) for column in columns], dim=1)
