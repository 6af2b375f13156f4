"""What the ops over a linear head share: checks, scored rows, which backend runs a call."""

from typing import NamedTuple

import torch

from spo_kernels._call import Rows, Shard
from spo_kernels._checks import (
    FLOAT_DTYPES,
    check_dtype,
    check_same_device,
    check_shape,
    check_tensor,
    dtype_name,
    fail,
)
from spo_kernels.planner import GRAD_INPUTS


def backend_of(name: str):
    """Return the module that runs the forward and backward of a call."""
    if name == "triton":
        from spo_kernels.kernels import linear_logprob_strategies

        return linear_logprob_strategies
    from spo_kernels import _tiled_torch

    return _tiled_torch


def planned_device(backend: str, device: torch.device) -> str:
    """Return the planner's name of the device that a backend runs on."""
    if backend == "torch":
        return "cpu"
    from spo_kernels.kernels.device import arch_of

    return f"cuda:{arch_of(device)}"


def needed_grads(tensors: tuple[torch.Tensor | None, ...]) -> frozenset[str]:
    """Return which of hidden, weight, bias, lora_a and lora_b need a gradient."""
    return frozenset(
        name
        for name, tensor in zip(GRAD_INPUTS, tensors, strict=True)
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
    )


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


def check_head_inputs(
    op: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    lora: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.dtype:
    """Refuse bad input and return the compute dtype (autocast's where it is on)."""
    named = {"hidden": hidden, "weight": weight, "labels": labels}
    for name, tensor in named.items():
        check_tensor(op, name, tensor)
    named["bias"] = bias
    floats = (*FLOAT_DTYPES, torch.float64)
    check_dtype(op, "hidden", hidden, floats)
    check_dtype(op, "labels", labels, (torch.int64, torch.int32))
    if hidden.dim() != labels.dim() + 1 or hidden.dim() < 2:
        fail(
            op,
            "labels",
            f"have hidden's leading shape {tuple(hidden.shape[:-1])}, at least one axis",
            tuple(labels.shape),
        )
    H = hidden.shape[-1]
    check_shape(op, "labels", labels, tuple(hidden.shape[:-1]), f"{tuple(hidden.shape[:-1])}")
    if weight.dim() == 2 and weight.numel() == 0:
        fail(
            op,
            "weight",
            f"hold [V, H] elements with H={H}",
            f"0 elements {tuple(weight.shape)}",
            way_out="A sharded head must be gathered first (ZeRO-3: GatheredParameters).",
            error=RuntimeError,
        )
    check_shape(op, "weight", weight, (None, H), "[V, H] with H={1}")
    V = weight.shape[0]
    heads = {"weight": weight}
    if bias is not None:
        check_tensor(op, "bias", bias)
        check_shape(op, "bias", bias, (V,), "[V] with V={0}")
        heads["bias"] = bias
    if lora is not None:
        if not (isinstance(lora, tuple) and len(lora) == 2):
            fail(op, "lora", "be a pair (a_out, b)", type(lora).__name__, error=TypeError)
        a_out, b = lora
        for name, tensor in (("lora a_out", a_out), ("lora b", b)):
            check_tensor(op, name, tensor)
        check_shape(op, "lora b", b, (V, None), "[V, r] with V={0}")
        if b.shape[1] == 0:
            fail(op, "lora b", "have rank r >= 1", 0)
        leading, rank = tuple(hidden.shape[:-1]), b.shape[1]
        check_shape(op, "lora a_out", a_out, (*leading, rank), f"{(*leading, rank)}")
        heads["lora a_out"], heads["lora b"] = a_out, b
    check_same_device(op, {**named, **heads})

    autocast = torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64
    for name, tensor in heads.items():
        check_dtype(op, name, tensor, floats)
        if tensor.dtype != hidden.dtype and not autocast:
            fail(
                op,
                name,
                f"have hidden's dtype {dtype_name(hidden.dtype)}",
                dtype_name(tensor.dtype),
                way_out="Cast one of them, or run under torch.autocast.",
                error=TypeError,
            )
    return torch.get_autocast_dtype(hidden.device.type) if autocast else hidden.dtype
