"""Workspace and traffic models of each strategy, by which the planner ranks them.

Peaks count what a call allocates beyond inputs, row outputs and returned gradients.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from spo_kernels.calls import layout
from spo_kernels.calls.layout import (
    PART_V,
    TORCH_MIN_ROWS,
    TORCH_VOCAB_CHUNK,
    head_slice_columns,
    padded_columns,
)

_TORCH_SLICE_ELEMENTS = 1 << 22
# row vectors of a chunk: labels, running sums, coefficients
_TORCH_ROW_BYTES = 256
_TRITON_MIN_ROWS = 128
MIN_VOCAB_STEP = 256


class Sizes(NamedTuple):
    """The facts of a call that the models need."""

    N: int
    H: int
    V: int
    R: int
    dtype: torch.dtype  # of the products: autocast's where it is on
    hidden_dtype: torch.dtype
    weight_dtype: torch.dtype
    needs: frozenset[str]
    outputs: frozenset[str]
    capped: bool
    gathered: bool
    head_strided: bool
    ranks: int = 1
    # the head's gradients are added to sums outside (pairwise)
    into: bool = False

    @property
    def item(self) -> int:
        return self.dtype.itemsize

    @property
    def weight_item(self) -> int:
        return self.weight_dtype.itemsize

    @property
    def cast_item(self) -> int:
        """Bytes an element of hidden states that must be cast, 0 where they need not."""
        return 0 if self.hidden_dtype == self.dtype else self.hidden_dtype.itemsize

    @property
    def kept_item(self) -> int:
        """Bytes an element that the triton backend keeps for its backward."""
        return 2 if self.dtype == torch.bfloat16 else 4

    @property
    def head_copied(self) -> bool:
        return self.head_strided or self.weight_dtype != self.dtype

    @property
    def entropy(self) -> bool:
        return "entropy" in self.outputs

    @property
    def stats(self) -> int:
        """Partial statistics a part of a tile has: maximum, sum, and those of asked outputs."""
        return 2 + len({"entropy", "log_sum_sq_probs", "mean_logits"} & self.outputs)

    @property
    def exchanged_bytes(self) -> int:
        """Bytes of all ranks' row statistics in the forward, 0 for a whole head."""
        return 0 if self.ranks == 1 else 192 * (self.ranks + 1) * self.N

    def summed_bytes(self, rows: int, item: int) -> int:
        """Bytes in which `direction` sums its gradients over the ranks, ``rows`` at a time."""
        return 0 if self.ranks == 1 else (self.N + 4 * rows) * (self.H + self.R) * item


def gemm_units(strategy: str, needs: frozenset[str]) -> int:
    """Return the N x H x V products of forward and backward."""
    products = ("hidden" in needs) + ("weight" in needs)
    if strategy == "score":
        return 1
    if strategy == "direction":
        return 1 + ("hidden" in needs)
    return 1 + products + (strategy == "recompute")


def _chunk_steps(total: int, least: int, most: int | None = None) -> list[int]:
    """Return chunk sizes from ``total`` down to ``least`` by quarters, multiples of ``least``."""
    size = max(least, math.ceil(max(total, 1) / least) * least)
    if most is not None:
        size = min(size, most)
    steps = [size]
    while size > least:
        size = max(least, min(size * 3 // 4 // least * least, size - least))
        steps.append(size)
    return steps


def _pick(steps: list[int], budget: int, peak_of) -> tuple[int, int]:
    """Return the largest step whose peak fits, or the smallest step, with its peak."""
    for step in steps:
        peak = peak_of(step)
        if peak <= budget:
            return step, peak
    return steps[-1], peak_of(steps[-1])


def torch_candidates(strategy: str, s: Sizes, budget: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (row_chunk, vocab_chunk, peak_bytes, bytes_moved) of the torch backend."""
    item = 8 if s.item == 8 else 4
    # by H alone, so that one slice of the head stays at 16 MiB
    chunk = min(TORCH_VOCAB_CHUNK, max(256, _TORCH_SLICE_ELEMENTS // s.H // 256 * 256), s.V)
    tiles = math.ceil(s.V / chunk)
    is_half, width = s.item < item, s.H + s.R
    # half inputs are upcast a slice at a time, by way of the compute dtype under autocast; the next
    # slice is made while the last one lives
    by_way = s.item if s.weight_item != s.item else 0
    # a bias is cast too, and its gradient summed beside itself
    bias_copy = 3 * chunk * item
    source = s.cast_item or s.item
    # rows as they are gathered and cast on the way to what is multiplied
    on_the_way = source * s.gathered + s.item * (is_half and s.cast_item > 0)
    is_copied = is_half or s.gathered or s.cast_item > 0
    # gradients of the head that are no fp32 are summed a slice at a time
    head_width = s.H * ("weight" in s.needs and s.weight_item < item)
    head_width += s.R * ("lora_b" in s.needs) + ("bias" in s.needs)
    # logits, and exponentials beside them where the logits are still wanted
    buffers = 1 + (s.capped or s.entropy)

    def row_chunks(rows: int) -> int:
        return max(1, math.ceil(s.N / rows))

    def copies(rows: int, padded: bool, slices: int) -> int:
        # the next rows, and the next slice of the head, are made while the last ones live
        alive = item * min(2, row_chunks(rows)) * (is_copied or padded)
        peak = rows * width * (alive + on_the_way + item * padded) + bias_copy
        return peak + chunk * width * (slices * item + by_way) * is_half

    def forward(rows: int) -> int:
        slopes = s.capped and strategy in ("direction", "resident")
        peak = (buffers + slopes) * rows * chunk * item + _TORCH_ROW_BYTES * rows
        slices = min(2, tiles * row_chunks(rows))
        peak += copies(rows, s.N % TORCH_MIN_ROWS > 0, slices)
        if strategy == "direction":
            # the sums, then label rows and a product beside them, one slice of the head gone
            label_rows = rows * width * (2 * item + (s.weight_item + by_way) * is_half)
            freed = chunk * width * item * (slices - 1) * is_half
            peak += rows * width * item + max(0, label_rows - freed)
        return peak

    def backward(rows: int) -> int:
        peak = (buffers + s.capped + s.entropy) * rows * chunk * item + _TORCH_ROW_BYTES * rows
        slices = min(2, tiles)
        peak += copies(rows, False, slices)
        # a slice of the head's gradients is made while the last one lives
        peak += slices * chunk * head_width * item
        if s.needs & {"hidden", "lora_a"}:
            # summed where they are returned if no row was dropped and nothing is cast
            summed = width if s.gathered or source < item else s.R
            peak += s.N * summed * (item + source * (s.gathered and source < item))
        return peak

    # scalars are tensors too
    kept = 64 * s.N + 1024
    if strategy == "direction":
        kept += s.N * width * item
    if strategy == "resident":
        kept += s.N * s.V * min(s.item, item) + item * s.N * tiles

    def peak_of(rows: int) -> int:
        after = 0
        if strategy == "direction":
            after = s.summed_bytes(rows, item)
        elif strategy != "score":
            after = backward(rows)
        return kept + max(forward(rows), s.exchanged_bytes, after)

    rows, peak = _pick(_chunk_steps(s.N, TORCH_MIN_ROWS, 1024), budget, peak_of)
    passes = row_chunks(rows)
    element = s.N * s.V * item
    # every product reads the head and writes it down again in the order it multiplies in
    moved = 2 * passes * gemm_units(strategy, s.needs) * s.V * s.H * item + 3 * element
    if strategy == "resident":
        moved += 2 * s.N * s.V * min(s.item, item) + 2 * element
    if strategy == "recompute":
        moved += 4 * element
    yield rows, chunk, peak, moved


def triton_candidates(strategy: str, s: Sizes, budget: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (row_chunk, vocab_chunk, peak_bytes, bytes_moved) of the triton backend."""
    width = s.H + s.R
    tiles = math.ceil(s.V / PART_V)
    padded_v = padded_columns(s.V)
    kept = 64 * s.N
    weight_pass = s.V * width * s.item
    cast = 0
    if s.head_copied:
        # the old slice, the cast one and its contiguous copy live side by side for a moment
        cast = 3 * head_slice_columns(s.V, s.H, s.item, True) * width * s.item
    # a cast gathers in the tensor's own dtype first
    row_item = (s.item if s.gathered or s.cast_item else 0) + s.cast_item * s.gathered

    def partials(rows: int) -> int:
        # one partial each per part, the reduction's row vectors, the rows themselves
        return rows * tiles * 4 * s.stats + 64 * rows + rows * width * row_item

    if strategy in ("score", "direction"):
        if strategy == "direction":
            kept += s.N * width * s.kept_item + 8 * s.N

        def peak_of(rows: int) -> int:
            tile = after = 0
            if strategy == "direction":
                tile = rows * padded_v * s.item + rows * width * 4
                after = s.summed_bytes(rows, 4)
            return kept + max(cast + partials(rows) + tile, s.exchanged_bytes, after)

        rows, peak = _pick(_chunk_steps(s.N, _TRITON_MIN_ROWS, 8192), budget, peak_of)
        passes = max(1, math.ceil(s.N / rows))
        moved = passes * weight_pass * (2 if strategy == "direction" else 1)
        if strategy == "direction":
            moved += 2 * s.N * s.V * s.item
        yield rows, s.V, peak, moved
        return

    # vocab chunk outer, all rows inner: one slice of grad_weight is one product over all rows
    row_steps = _chunk_steps(s.N, _TRITON_MIN_ROWS, 8192)
    all_hidden = s.N * width * row_item
    if s.kept_item > s.item:
        # fp16 sums the head's gradients against rows scaled by powers of two
        scaled = s.H * ("weight" in s.needs) + s.R * ("lora_b" in s.needs)
        all_hidden += s.N * scaled * s.item
    grad_hidden = s.N * width * 4 if s.needs & {"hidden", "lora_a"} else 0
    if strategy == "resident":
        kept += s.N * padded_v * s.kept_item + 4 * s.N * tiles
    # a product is written in fp32 first, but for our kernel's
    is_own = s.item == 2 and s.N <= layout.WEIGHT_KERNEL_ROWS and not s.into
    summed = s.H * ("weight" in s.needs and not is_own) + s.R * ("lora_b" in s.needs)
    summed += "bias" in s.needs
    forward_rows = row_steps[-1]
    for rows in row_steps:
        forward_rows = rows
        if kept + cast + partials(rows) <= budget:
            break
    forward_peak = kept + cast + partials(forward_rows)
    for vocab_chunk in _chunk_steps(s.V, MIN_VOCAB_STEP):
        scratch = s.N * min(vocab_chunk, padded_v) * s.item
        slice_grad = min(vocab_chunk, s.V) * summed * 4
        peak = max(
            forward_peak,
            kept + s.exchanged_bytes,
            kept + cast + all_hidden + grad_hidden + scratch + slice_grad,
        )
        chunks = math.ceil(s.V / vocab_chunk)
        element = s.N * s.V * s.item
        products = len(s.needs & {"hidden", "weight"})
        moved = 2 * weight_pass + element * (1 + products)
        moved += chunks * s.N * width * (s.item * products + 8 * bool(grad_hidden))
        if "weight" in s.needs and not s.into:
            moved += s.V * s.H * (s.weight_item if is_own else 8 + s.weight_item)
        if strategy == "resident":
            moved += 2 * element
        yield forward_rows, vocab_chunk, peak, moved
        if peak <= budget:
            return
