"""Which rows of a batch are scored: chosen on the host, or in a graph that reads nothing there."""

from typing import NamedTuple

import torch

from spo_kernels.calls.checks import (
    fail,
)
from spo_kernels.calls.linear_logprob import Rows, Shard


def scored_rows_of(
    op: str,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    ignore_index: int,
    scored_rows: int | None,
    validate: bool,
    shard: Shard | None = None,
) -> tuple[Rows, torch.Tensor, torch.Tensor | None]:
    """Return the scored rows, their labels and, without a sync, whether the count was right.

    With a shard ``vocab_size`` is its own; labels come relative to its first row.
    """
    scored = labels != ignore_index
    _check_scored_rows(op, labels, scored_rows)
    on_host = labels.device.type == "cpu"
    exact = None
    if scored_rows is None or validate or on_host:
        counts = [scored.sum()] if shard is None else [scored.sum(), shard.differs]
        whole = vocab_size if shard is None else shard.total
        count, *differs = read_counts(op, counts, labels, scored, whole)
        if any(differs):
            fail(
                op,
                "labels",
                "be the same on every rank of group",
                "different ones",
                way_out="Pass the group that shards the vocabulary, not the data.",
            )
        if scored_rows is not None and scored_rows != count:
            fail(op, "scored_rows", f"be the number of scored labels, {count}", scored_rows)
        scored_rows = count
    else:
        exact = scored.sum() == scored_rows
    rows, row_labels = rows_of(hidden, labels, scored, scored_rows)
    return rows, row_labels if shard is None else row_labels - shard.start, exact


def reads_no_host(labels: torch.Tensor, scored_rows: int | None) -> bool:
    """Whether the call is traced or captured, where the host has no numbers to read."""
    if torch.compiler.is_compiling():
        return True
    needs_count = scored_rows is None and labels.device.type == "cuda"
    return needs_count and torch.cuda.is_current_stream_capturing()


class GraphRows(NamedTuple):
    """The rows of a call that reads nothing on the host, and what its outputs must become."""

    hidden: torch.Tensor
    lora_a: torch.Tensor | None
    rows: Rows
    labels: torch.Tensor  # [N] int64, 0 where one is outside [0, V)
    ignored: torch.Tensor  # [...] bool: outputs read 0
    wrong: torch.Tensor  # [...] bool: outputs read NaN

    def repaired(self, value: torch.Tensor | None) -> torch.Tensor | None:
        """Return an output without what ignored rows and bad labels left in it."""
        if value is None:
            return None
        if value.dtype == torch.bool:
            return value & ~(self.ignored | self.wrong)
        return value.masked_fill(self.ignored, 0.0).masked_fill(self.wrong, torch.nan)


def graph_rows_of(
    op: str,
    hidden: torch.Tensor,
    lora_a: torch.Tensor | None,
    labels: torch.Tensor,
    vocab_size: int,
    ignore_index: int,
    scored_rows: int | None,
) -> GraphRows:
    """Choose the rows of a traced or captured call.

    Without a count every row is scored; the hidden states of ignored ones become 0, and so does
    their gradient, so that nothing they hold, not even NaN, gets out.
    """
    _check_scored_rows(op, labels, scored_rows)
    scored = labels != ignore_index
    outside = scored & ((labels < 0) | (labels >= vocab_size))
    usable = labels.masked_fill(~scored | outside, 0)
    if scored_rows is None:
        hidden, lora_a = (
            None if tensor is None else tensor.masked_fill(~scored[..., None], 0.0)
            for tensor in (hidden, lora_a)
        )
        rows = Rows(labels.numel(), labels.shape, None)
        return GraphRows(hidden, lora_a, rows, usable.reshape(-1).long(), ~scored, outside)
    rows, row_labels = rows_of(hidden, usable, scored, scored_rows)
    wrong = outside | (scored.sum() != scored_rows)
    return GraphRows(hidden, lora_a, rows, row_labels, ~scored, wrong)


def rows_of(
    hidden: torch.Tensor, labels: torch.Tensor, scored: torch.Tensor, count: int
) -> tuple[Rows, torch.Tensor]:
    """Return the ``count`` rows that are scored and their labels ``[N]`` int64."""
    flat_view = all(
        hidden.stride(i) == hidden.stride(i + 1) * hidden.size(i + 1)
        for i in range(hidden.dim() - 2)
    )
    if count == labels.numel() and flat_view:
        return Rows(count, labels.shape, None), labels.reshape(-1).long().contiguous()
    places = torch.nonzero_static(scored, size=count, fill_value=0)
    axes = tuple(places.t().contiguous().unbind())
    return Rows(count, labels.shape, axes), labels[axes].long()


def _check_scored_rows(op: str, labels: torch.Tensor, scored_rows: int | None) -> None:
    if scored_rows is None:
        return
    if isinstance(scored_rows, bool) or not isinstance(scored_rows, int):
        fail(op, "scored_rows", "be an int or None", type(scored_rows).__name__, error=TypeError)
    if not 0 <= scored_rows <= labels.numel():
        fail(op, "scored_rows", f"be between 0 and {labels.numel()}", scored_rows)


def read_counts(
    op: str,
    counts: list[torch.Tensor],
    labels: torch.Tensor,
    scored: torch.Tensor,
    vocab_size: int | torch.Tensor,
) -> list[int]:
    """Return integer tensors as one list, refusing labels outside [0, V), in one host read."""
    outside = scored & ((labels < 0) | (labels >= vocab_size))
    values = torch.cat([outside.sum()[None], *(count.reshape(-1) for count in counts)]).tolist()
    if values[0]:
        place = int(outside.flatten().nonzero()[0])
        label, end = int(labels.flatten()[place]), int(vocab_size)
        raise IndexError(f"{op}: target {label} at row {place} outside [0, {end})")
    return values[1:]
